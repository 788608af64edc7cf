"""Everything between text and tokens: tokenizer, chat templates, and what stands beside the core."""
