"""Log probabilities: values and ranks by definition, ties, the whole vocabulary, and the cut messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.sample import to_lists, token_logprobs

INF = float("inf")
values = st.integers(-4, 4).map(float) | st.floats(-20, 20, width=32) | st.just(-INF)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=20).filter(lambda row: max(row) > -INF), st.data())
def test_by_definition(row, data):
    actual, k = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(-1, len(row) + 3))
    got = token_logprobs(torch.tensor([row]), torch.tensor([actual]), k)
    total = max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row))
    exact = torch.tensor([row]).log_softmax(-1)[0].tolist()  # float32 may make equals of unequal logits
    order = sorted(range(len(row)), key=lambda t: (-exact[t], t))
    assert got.token_ids.tolist() == [[actual, *(order if k < 0 else order[:k])]]
    want = [row[t] - total for t in got.token_ids[0].tolist()]
    assert got.logprobs[0].tolist() == pytest.approx(want, abs=1e-5)
    assert got.ranks.tolist() == [1 + sum(x > exact[actual] for x in exact)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = torch.tensor([0, 1, 2])
    got, want = token_logprobs(logits, actual, 4), token_logprobs(logits.float(), actual, 4)
    assert got.logprobs.dtype == torch.float32
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.token_ids, want.token_ids)


def test_ties_share_a_rank_and_are_listed_by_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, -0.0, 0.0]]).repeat(3, 1)
    got = token_logprobs(logits, torch.tensor([3, 0, 5]), -1)
    assert got.ranks.tolist() == [1, 4, 5]
    assert got.token_ids[:, 1:].tolist() == [[1, 2, 3, 0, 4, 5]] * 3


def test_ids_out_of_range_cannot_read_elsewhere():
    got = token_logprobs(torch.zeros(2, 4), torch.tensor([-1, 99]), 1)
    assert got.token_ids.tolist() == [[0, 0], [3, 0]]


def test_to_lists_cuts_each_row_to_its_own_k():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(4, 1)
    tensors = token_logprobs(logits, torch.tensor([0, 1, 2, 3]), 4)
    none, chosen, two, everything = to_lists(tensors, [None, 0, 2, -1])
    assert none is None
    assert (chosen.token_ids, chosen.ranks) == ([[1]], [3])
    assert (two.token_ids, two.ranks) == ([[2, 3, 2]], [2])
    assert two.logprobs == [pytest.approx([math.log(p) for p in (0.3, 0.4, 0.3)])]
    assert everything.token_ids == [[3, 3, 2, 1, 0]]
    assert to_lists(token_logprobs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2), []) == []
