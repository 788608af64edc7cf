"""Paged attention against a float64 loop over queries, heads and keys."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.attention import attend, causal_mask, gather_kv, write_kv


def slow(q, k, v, scale, window):
    """Each query sees keys up to itself; the last query is at the last key."""
    out = torch.empty_like(q, dtype=torch.float64)
    group, offset = q.shape[1] // k.shape[1], len(k) - len(q)
    for i in range(len(q)):
        first = 0 if window is None else max(0, offset + i - window + 1)
        for h in range(q.shape[1]):
            seen = slice(first, offset + i + 1), h // group
            keys, values = k[seen].double(), v[seen].double()
            out[i, h] = torch.softmax(keys @ q[i, h].double() * scale, 0) @ values
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("q_len, length", [(1, 1), (1, 33), (5, 5), (7, 33), (16, 48)])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_attend(heads, kv_heads, q_len, length, window):
    g = torch.Generator().manual_seed(heads * length)
    q = torch.randn(q_len, heads, 8, generator=g)
    k, v = torch.randn(2, length, kv_heads, 8, generator=g)
    mask = causal_mask(q_len, length, window, dtype=q.dtype, device=q.device)
    torch.testing.assert_close(attend(q, k, v, scale=0.3, mask=mask).double(), slow(q, k, v, 0.3, window),
                               rtol=1e-5, atol=1e-6)
    if window is None and q_len in (1, length):
        found = attend(q, k, v, scale=0.3, causal=q_len > 1)
        torch.testing.assert_close(found.double(), slow(q, k, v, 0.3, None), rtol=1e-5, atol=1e-6)


def test_write_then_gather_returns_what_was_written():
    cache = torch.full((2, 6, 4, 2, 3), float("nan"))
    blocks, positions = torch.tensor([5, 1, 3], dtype=torch.int32), torch.arange(10)
    k, v = torch.randn(2, 10, 2, 3)
    slots = blocks[positions // 4].long() * 4 + positions % 4
    write_kv(cache, k[:7], v[:7], slots[:7])
    write_kv(cache, k[7:], v[7:], slots[7:])
    keys, values = gather_kv(cache, blocks, 10)
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert cache[:, [0, 2, 4]].isnan().all() and cache[:, 3, 2:].isnan().all()
