"""The workers: one device each, with its model, its cache and its running batch."""
