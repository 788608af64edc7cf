"""Views of a step's buffers: apart, inside, and at addresses for which kernels need no other variant."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.worker.step_buffers import ALIGNMENT, StepBuffers

TOKENS, ROWS = 70, 9


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, TOKENS), rows=st.integers(1, ROWS))
def test_a_layout(tokens, rows):
    buffers = StepBuffers(max_tokens=TOKENS, max_rows=ROWS, device=torch.device("cpu"))
    *mirrors, num_bytes = buffers.lay_out(tokens, rows)
    assert [len(mirror.device) for mirror in mirrors] == [tokens] * 3 + [rows, rows + 1, rows]
    start = mirrors[0].device.data_ptr()
    spans = [(mirror.device.data_ptr() - start, mirror.device.nbytes) for mirror in mirrors]
    assert all(at % ALIGNMENT == 0 for at, _ in spans)
    assert all(at + length <= following for (at, length), (following, _) in pairwise(spans))
    assert sum(spans[-1]) <= num_bytes <= buffers._pinned.nbytes
    for number, mirror in enumerate(mirrors):
        mirror.host[:] = number
    assert [set(mirror.device.tolist()) for mirror in mirrors] == [{number} for number in range(6)]
