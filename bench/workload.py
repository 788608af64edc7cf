"""Random requests: token ids and lengths drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..engine.request import RequestOutput, SamplingParams
from ..plugins.errors import UsageError

if TYPE_CHECKING:
    from ..engine.llm import LLM

Rng = np.random.Generator


def make_rng(seed: int) -> Rng:
    """A generator for any seed the engine takes, negative ones included."""
    return np.random.default_rng(seed % 2**64)


def random_lengths(rng: Rng, count: int, length: int, range_ratio: float = 0.0) -> list[int]:
    """`count` lengths, uniform in length * (1 - range_ratio) .. length * (1 + range_ratio), at least 1."""
    low, high = max(1, int(length * (1 - range_ratio))), max(1, int(length * (1 + range_ratio)))
    return rng.integers(low, high, count, endpoint=True).tolist()


def random_prompts(rng: Rng, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Token ids of each length. Fresh for every run: a prompt seen before is in the prefix cache."""
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def generate_exactly(
    llm: LLM, prompts: Sequence[list[int]], output_lens: Sequence[int], *, detokenize: bool = True
) -> list[RequestOutput]:
    """Greedy completions of exactly `output_lens[i]` tokens. Raises UsageError if one ends early."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=detokenize) for n in output_lens
    ]
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    for prompt, wanted, output in zip(prompts, output_lens, outputs):
        if (got := len(output.outputs[0].token_ids)) != wanted:
            raise UsageError(
                "a request ended before its length",
                found=f"{got} of {wanted} tokens after a prompt of {len(prompt)}",
                fix="shorter lengths, or a longer --max-model-len",
            )
    return outputs
