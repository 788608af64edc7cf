"""Ragged batches over a cache that is poisoned wherever nobody wrote, and their attention in float64."""

from __future__ import annotations

from itertools import accumulate

import torch

from nybble.csrc.attention import Ragged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")


def ragged(lens, page, rng, spare=2):
    """(batch, number of blocks, slots of each request's keys): blocks in any order, unused table entries poisoned."""
    counts = [-(-keys // page) for _, keys in lens]
    order = (torch.randperm(sum(counts), generator=rng) + 1).int()
    table = torch.full((len(lens), max(counts) + spare), 2**30, dtype=torch.int32)
    slots, at = [], 0
    for row, (count, (_, keys)) in enumerate(zip(counts, lens)):
        table[row, :count] = order[at : at + count]
        at += count
        n = torch.arange(keys)
        slots.append(table[row, n // page].long() * page + n % page)
    starts = torch.tensor([0, *accumulate(queries for queries, _ in lens)], dtype=torch.int32)
    batch = Ragged(query_start=starts.to(DEVICE), seq_lens=torch.tensor([n for _, n in lens], dtype=torch.int32,
                   device=DEVICE), block_table=table.to(DEVICE), max_query_len=max(q for q, _ in lens))
    return batch, sum(counts) + 1, slots


def expected(lens, q, keys, values, scale, window=None):
    """float64 attention; keys and values: a request's [L, heads, D] each. A request without keys gets zeros."""
    out, at = [], 0
    for (queries, length), k, v in zip(lens, keys, values):
        mine, at = q[at : at + queries].double(), at + queries
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        position = torch.arange(length - queries, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None]
        hidden = (key > position) | (key <= position - (window or 2**30))
        scores = torch.einsum("qhd,khd->hqk", mine, k).mul(scale).masked_fill(hidden, -torch.inf)
        out.append(torch.einsum("hqk,khv->qhv", scores.softmax(-1).nan_to_num(0.0), v))
    return torch.cat(out)


def close(found, wanted, dtype):
    """Scores of size one: a probability is rounded to the dtype before it meets the values, and so is their sum."""
    assert found.dtype == dtype and found.isfinite().all()
    eps = max(torch.finfo(dtype).eps, 2**-18)
    torch.testing.assert_close(found.double(), wanted, rtol=2 * eps, atol=4 * eps)


def paged_case(lens, heads, kv_heads, width, page, dtype, cache_dtype=None, seed=0):
    """Random q, and a cache that holds NaN wherever nothing was written."""
    rng = torch.Generator().manual_seed(seed)
    batch, blocks, slots = ragged(lens, page, rng)
    q = torch.randn(sum(n for n, _ in lens), heads, width, generator=rng).to(DEVICE, dtype)
    cache = torch.full((2, blocks * page, kv_heads, width), NAN)
    kept = [torch.randn(2, len(at), kv_heads, width, generator=rng).to(cache_dtype or dtype).float() for at in slots]
    for at, kv in zip(slots, kept):
        cache[:, at] = kv
    cache = cache.view(2, blocks, page, kv_heads, width).to(cache_dtype or dtype).to(DEVICE)
    return batch, q, cache, [kv[0].to(DEVICE) for kv in kept], [kv[1].to(DEVICE) for kv in kept]
