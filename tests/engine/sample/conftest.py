"""A batch as the runner holds it: sampling state, and the host arrays beside it."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from nybble.engine.plan import NewRequest
from nybble.engine.sample import Sampler, SamplingState

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Row:
    """A request to sample; `bad_words` are token ids."""

    params: object
    seed: int = 0
    prompt: list = field(default_factory=lambda: [0])
    outputs: list = field(default_factory=list)
    stops: list = field(default_factory=list)
    bad_words: list = field(default_factory=list)

    def request(self):
        return NewRequest(
            request_id="r", token_ids=self.prompt + self.outputs, num_prompt_tokens=len(self.prompt),
            num_computed_tokens=0, block_ids=(), params=self.params, seed=self.seed,
            stop_token_ids=self.stops, bad_words_token_ids=self.bad_words,
        )


class Batch:
    def __init__(self, vocab, rows=(), *, max_rows=8, max_len=64, processors=(), device=CPU):
        self.state = SamplingState(max_rows=max_rows, vocab_size=vocab, device=device,
                                   processors=processors)
        self.num_tokens, self.num_prompt = np.zeros(max_rows, np.int64), np.zeros(max_rows, np.int64)
        self.token_ids = np.full((max_rows, max_len), -7, np.int32)
        for i, row in enumerate(rows):
            self.put(i, row)

    def put(self, at, row):
        self.state.set_row(at, row.request())
        tokens = row.prompt + row.outputs
        self.num_tokens[at], self.num_prompt[at] = len(tokens), len(row.prompt)
        self.token_ids[at, : len(tokens)] = tokens

    def move(self, src, dst):
        self.state.move_row(src, dst)
        for array in (self.num_tokens, self.num_prompt, self.token_ids):
            array[dst] = array[src]

    def grow(self, rows, tokens):
        self.state.observe(np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.int64))
        for row, token in zip(rows, tokens):
            self.token_ids[row, self.num_tokens[row]] = token
            self.num_tokens[row] += 1

    def metadata(self, rows):
        rows = np.array(rows, dtype=np.int64)
        return self.state.metadata(rows, self.num_tokens, self.num_prompt, self.token_ids)

    def sample(self, logits, rows=None):
        return Sampler().forward(logits, self.metadata(range(len(logits)) if rows is None else rows))


@pytest.fixture(scope="session")  # both are classes, so Hypothesis may share them between examples
def row_type():
    return Row


@pytest.fixture(scope="session")
def batch_type():
    return Batch
