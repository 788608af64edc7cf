"""Latent attention in both forms, and its merging of chunks, against one float64 softmax over keys made of latents."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.csrc.attention import (
    absorb,
    absorbing_is_cheaper,
    attend_expanded,
    attend_rows,
    gather_rows,
    mla_reference,
    project_values,
    write_rows,
)
from nybble.csrc.attention.mla_reference import State, attend_state, merge

HEADS, LATENT, NOPE, ROPE, VALUE, SCALE = 3, 10, 6, 4, 5, 0.3


def problem(q_len, length, dtype=torch.float32):
    g = torch.Generator().manual_seed(1000 * q_len + length)
    q = torch.randn(q_len, HEADS, NOPE + ROPE, generator=g)
    rows = torch.randn(length, LATENT + ROPE, generator=g)
    w_kv = torch.randn(HEADS, NOPE + VALUE, LATENT, generator=g)
    return q.to(dtype), rows.to(dtype), w_kv.to(dtype)


def naive(q, rows, w_kv):
    """Query by query, head by head; the queries are the last tokens."""
    q, rows, w_kv = q.double(), rows.double(), w_kv.double()
    out = torch.empty(*q.shape[:2], VALUE, dtype=torch.float64)
    for i in range(len(q)):
        seen = rows[: len(rows) - len(q) + i + 1]
        for h in range(HEADS):
            keys = torch.cat((seen[:, :LATENT] @ w_kv[h, :NOPE].T, seen[:, LATENT:]), dim=1)
            out[i, h] = torch.softmax(keys @ q[i, h] * SCALE, 0) @ (seen[:, :LATENT] @ w_kv[h, NOPE:].T)
    return out


def absorbed(q, rows, w_kv):
    w_uk, w_uv = w_kv.split((NOPE, VALUE), dim=1)
    query = torch.cat((absorb(q[..., :NOPE], w_uk), q[..., NOPE:]), dim=-1)
    return project_values(attend_rows(query, rows, LATENT, scale=SCALE), w_uv)


def expanded(q, rows, w_kv, chunk=1024):
    return attend_expanded(q, lambda start, stop: rows[start:stop], len(rows), w_kv, value=VALUE, scale=SCALE,
                           chunk=chunk)


FORMS = {
    "absorbed": absorbed,
    "expanded": expanded,
    **{f"expanded by {n}": lambda *args, n=n: expanded(*args, chunk=n) for n in (1, 4, 7)},
}


@pytest.fixture(params=[1 << 25, 40], ids=["queries at once", "queries in tiles"])
def scores(request, monkeypatch):
    monkeypatch.setattr(mla_reference, "SCORES", request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("q_len, length", [(1, 1), (1, 33), (5, 5), (7, 33), (17, 48), (48, 48)])
def test_both_forms_are_the_naive_one(form, q_len, length, scores):
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        q, rows, w_kv = problem(q_len, length, dtype)
        found, expected = FORMS[form](q, rows, w_kv), naive(q, rows, w_kv)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@given(cuts=st.sets(st.integers(1, 29)), order=st.randoms(use_true_random=False), seed=st.integers(0, 999))
def test_merging_parts_in_any_order_is_the_whole(cuts, order, seed):
    q, k, v = torch.randn(3, 30, HEADS, VALUE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = q[:4] * 10  # scores far apart: sums that are not carried relative to their largest overflow or vanish
    bounds = [0, *sorted(cuts), 30]
    parts = [attend_state(q, k[a:b], v[a:b], None, scale=3.0) for a, b in pairwise(bounds)]
    order.shuffle(parts)
    total = State(torch.zeros_like(parts[0].out), torch.full_like(parts[0].lse, float("-inf")))
    for part in parts:
        total = merge(total, part)
    for found, expected in zip(total, attend_state(q, k, v, None, scale=3.0)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_merging_nothing_with_nothing_is_nothing():
    nothing = State(torch.zeros(2, HEADS, VALUE), torch.full((2, HEADS), float("-inf")))
    out, lse = merge(nothing, nothing)
    assert torch.equal(out, nothing.out) and torch.equal(lse, nothing.lse)


@pytest.mark.parametrize("q_len, length, cheaper", [
    (1, 1, False), (1, 2, True), (1, 4096, True), (160, 8192, True), (180, 8192, False), (4096, 4096, False)])
def test_the_cheaper_form_at_the_sizes_of_v2(q_len, length, cheaper):
    assert absorbing_is_cheaper(q_len, length, latent=512, nope=128, value=128) is cheaper


def test_write_then_gather_returns_what_was_written():
    cache = torch.full((1, 6, 4, 1, 3), float("nan"))
    blocks, positions, rows = torch.tensor([5, 1, 3], dtype=torch.int32), torch.arange(10), torch.randn(10, 3)
    slots = blocks[positions // 4].long() * 4 + positions % 4
    write_rows(cache, rows[:7], slots[:7])
    write_rows(cache, rows[7:], slots[7:])
    assert torch.equal(gather_rows(cache, blocks, 10), rows)
    assert cache[:, [0, 2, 4]].isnan().all() and cache[:, 3, 2:].isnan().all()
