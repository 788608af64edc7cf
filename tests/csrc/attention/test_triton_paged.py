"""The Triton attention kernel against float64 over ragged batches: paged K and V, latent rows, plain keys."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

from nybble.csrc.attention import (
    AttentionTile,
    HeadNorms,
    attend_latent,
    attend_paged,
    attend_plain,
    rope_and_attend,
    rope_and_cache_reference,
)
from nybble.csrc.attention.paged import LATENT, MAX_SPLITS, TILES, shrunk, splits_for
from tests.csrc.attention.ragged import DEVICE, close, expected, paged_case, ragged

FP8 = torch.float8_e4m3fn
# Queries and keys of requests: alone, over prefixes, at the edges of tiles and pages, and a padding row.
MIXED = [(1, 1), (5, 5), (17, 200), (0, 3), (1, 65), (40, 40), (1, 0), (5, 63)]
DECODE = [(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 200, 0)]
# Small tiles reach every edge of the loops; those of the table would hold whole tests.
SMALL = AttentionTile(m=16, n=32, warps=4, stages=2)
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu)]
EXACT = [*DTYPES, pytest.param(torch.float32, id="fp32")]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("lens", [pytest.param(MIXED, id="mixed"), pytest.param(DECODE, id="decode")])
@pytest.mark.parametrize("heads, kv_heads, width, page, window, tile", [
    (4, 4, 32, 16, None, SMALL), (4, 2, 64, 64, None, SMALL), (8, 2, 128, 16, None, None), (7, 1, 80, 16, None, SMALL),
    (4, 2, 8, 32, None, SMALL), (4, 2, 64, 16, 1, SMALL), (7, 1, 32, 64, 37, SMALL), (2, 1, 96, 4, 64, None)])
def test_ragged_batches(dtype, lens, heads, kv_heads, width, page, window, tile):
    batch, q, cache, keys, values = paged_case(lens, heads, kv_heads, width, page, dtype)
    found = attend_paged(q, cache, batch, scale=width**-0.5, window=window, splits=1, tile=tile)
    close(found, expected(lens, q, keys, values, width**-0.5, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 8, None])
@pytest.mark.parametrize("lens, window", [(DECODE, None), (DECODE, 37), ([(3, 200), (1, 17), (2, 0), (4, 63)], None)],
                         ids=["decode", "window", "short queries"])
def test_splits_give_what_one_pass_gives(monkeypatch, dtype, splits, lens, window):
    monkeypatch.setattr("nybble.csrc.attention.paged.MIN_SHARE", 32)
    batch, q, cache, keys, values = paged_case(lens, 4, 1, 48, 16, dtype)
    found = attend_paged(q, cache, batch, scale=0.2, window=window, splits=splits, tile=SMALL)
    close(found, expected(lens, q, keys, values, 0.2, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, pytest.param(FP8, marks=pytest.mark.gpu)], ids=["", "fp8"])
@pytest.mark.parametrize("heads, kv_heads, width, window, splits, normed", [
    (4, 4, 32, None, 1, False), (8, 2, 128, None, None, False), (7, 1, 80, None, 3, True), (4, 2, 64, 1, 1, False),
    (4, 1, 48, 37, 3, True), (32, 1, 64, 100, None, False)])
def test_decoding_in_one_launch(monkeypatch, dtype, cache_dtype, heads, kv_heads, width, window, splits, normed):
    """The newest key and value are rotated, stored and attended to, and nothing else of the cache is touched."""
    monkeypatch.setattr("nybble.csrc.attention.paged.MIN_SHARE", 32)
    lens = [(1, 200), (1, 1), (1, 0), (1, 64), (1, 65), (1, 129), (1, 17)]
    batch, _, cache, keys, values = paged_case(lens, heads, kv_heads, width, 16, dtype, cache_dtype)
    rng = torch.Generator().manual_seed(1)
    qkv = torch.randn(len(lens), (heads + 2 * kv_heads) * width + 16, generator=rng).to(DEVICE, dtype)[:, :-16]
    angles = torch.rand(len(lens), 1, width // 2, generator=rng).to(DEVICE)
    cos, sin = angles.cos().repeat(1, 1, 2).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    norms = HeadNorms(*(torch.rand(width, generator=rng).to(DEVICE, dtype) for _ in range(2)), 1e-5) if normed else None
    slots = torch.tensor([batch.block_table[row, (n - 1) // 16] * 16 + (n - 1) % 16 if n else 0
                          for row, (_, n) in enumerate(lens)], device=DEVICE)
    k_scale, v_scale = (0.5, 2.0) if cache_dtype else (1.0, 1.0)
    wanted_cache = cache.clone()
    kept = torch.tensor([n > 0 for _, n in lens], device=DEVICE)
    q = rope_and_cache_reference(qkv, cos, sin, wanted_cache, torch.where(kept, slots, -1), heads=heads, norms=norms,
                                 k_scale=k_scale, v_scale=v_scale)
    flat = wanted_cache.flatten(1, 2).float()
    for row, (_, n) in enumerate(lens):
        if n:
            keys[row][-1], values[row][-1] = flat[:, slots[row]]
    found = rope_and_attend(qkv, cos, sin, cache, slots, batch, heads=heads, norms=norms, scale=0.1, window=window,
                            k_scale=k_scale, v_scale=v_scale, splits=splits, tile=None if heads == 32 else SMALL)
    wanted = expected(lens, q, [k_scale * k for k in keys], [v_scale * v for v in values], 0.1, window)
    close(found / v_scale, wanted / v_scale, dtype)
    eps = torch.finfo(dtype).eps if cache_dtype is None else 2**-3
    # the reference rounds the products of a rotation, too
    torch.testing.assert_close(cache.float(), wanted_cache.float(), rtol=2 * eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("lens", [pytest.param(MIXED, id="mixed"), pytest.param(DECODE, id="decode")])
def test_a_cache_of_eight_bits_times_its_scales(dtype, splits, lens):
    batch, q, cache, keys, values = paged_case(lens, 4, 2, 64, 16, dtype, FP8)
    found = attend_paged(q, cache, batch, scale=0.1, k_scale=0.5, v_scale=2.0, splits=splits, tile=SMALL)
    wanted = expected(lens, q, [0.5 * k for k in keys], [2.0 * v for v in values], 0.1)
    close(found / 2, wanted / 2, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, splits", [(MIXED, 1), (DECODE, 1), (DECODE, 3)], ids=["mixed", "decode", "splits"])
@pytest.mark.parametrize("heads, latent, pe, page, cache_dtype", [
    (4, 32, 8, 16, None), (16, 64, 16, 64, None), (24, 24, 16, 16, None), (4, 64, 16, 16, FP8)],
    ids=["4x32", "16x64", "24x24", "fp8"])
def test_latent_rows(monkeypatch, dtype, lens, splits, heads, latent, pe, page, cache_dtype):
    monkeypatch.setattr("nybble.csrc.attention.paged.MIN_SHARE", 32)
    batch, q, cache, rows, _ = paged_case(lens, heads, 1, latent + pe, page, dtype, cache_dtype)
    scale = 0.5 if cache_dtype else 1.0
    found = attend_latent(q[..., :latent], q[..., latent:], cache[:1], batch, scale=0.2, kv_scale=scale, splits=splits,
                          tile=SMALL)
    rows = [scale * row for row in rows]
    close(found, expected(lens, q, rows, [row[..., :latent] for row in rows], 0.2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_keys_with_a_part_that_all_heads_share(dtype):
    lens, heads, nope, pe, value = [(5, 5), (17, 40), (1, 33)], 3, 32, 8, 24
    rng = torch.Generator().manual_seed(0)
    batch, *_ = ragged(lens, 16, rng)
    total, starts = sum(n for _, n in lens), [0, *accumulate(n for _, n in lens)]
    q = torch.randn(sum(n for n, _ in lens), heads, nope + pe, generator=rng).to(DEVICE, dtype)
    kv = torch.randn(total, heads, nope + value, generator=rng).to(DEVICE, dtype)
    k_pe = torch.randn(total, 1, pe, generator=rng).to(DEVICE, dtype)
    k, v = kv.split((nope, value), -1)
    found = attend_plain(q[..., :nope], q[..., nope:], k, k_pe, v, batch, scale=0.2, tile=SMALL,
                         key_start=torch.tensor(starts[:-1], dtype=torch.int32, device=DEVICE))
    whole = torch.cat((k, k_pe.expand(-1, heads, -1)), -1)
    pieces = [slice(a, b) for a, b in pairwise(starts)]
    close(found, expected(lens, q, [whole[p] for p in pieces], [v[p] for p in pieces], 0.2), dtype)


def test_an_empty_batch():
    batch, q, cache, *_ = paged_case([(0, 5)], 2, 1, 32, 16, torch.float16)
    assert attend_paged(q, cache, batch, scale=1.0).shape == (0, 2, 32)


@pytest.mark.parametrize("programs, max_len, splits", [(1, 100_000, 2), (2, 100_000, 1), (5, 100_000, 1), (1, 200, 2),
                                                       (1, 64, 1)])
def test_splits_depend_on_nothing_but_shapes(programs, max_len, splits):
    cpu = torch.device("cpu")
    assert splits_for(programs, max_len, cpu) == splits <= MAX_SPLITS


@pytest.mark.parametrize("tile", [*TILES, *LATENT], ids=lambda t: f"{t.m}x{t.n}")
@pytest.mark.parametrize("room", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("key_bytes", [128, 512, 1024, 1152, 2304])
def test_tiles_shrink_to_fit_a_device(tile, room, key_bytes):
    small = shrunk(tile, key_bytes, 1, room)
    assert (small.m + small.n * (small.stages - 1)) * key_bytes <= room
    assert small == tile or (tile.m + tile.n * (tile.stages - 1)) * key_bytes > room


def test_real_shapes_compile_for_hopper_and_are_pipelined(tmp_path):
    """In a process of its own: this one interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, Path(__file__).with_name("compile_sm90.py")], env=env, text=True,
                          capture_output=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
