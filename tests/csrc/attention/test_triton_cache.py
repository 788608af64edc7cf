"""Writing the cache by Triton, alone or with rotation and norm, does what plain torch does step by step."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.attention import HeadNorms, gather_kv, rope_and_cache, rope_and_cache_reference, store_kv, write_kv
from nybble.models.rope import RopeConfig, Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8, PAGE, BLOCKS = torch.float8_e4m3fn, 16, 5
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32"),
          pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu)]
SLOTS = torch.tensor([79, 3, -1, 16, 0, -1, 47], device=DEVICE)
TOKENS = len(SLOTS)


def poisoned(planes, heads, width, dtype):
    return torch.full((planes, BLOCKS, PAGE, heads, width), float("nan"), device=DEVICE).to(dtype)


def same_cache(found, wanted, dtype, tolerance):
    """Equal where neither is NaN, NaN in the same places; an FP8 code may be rounded to the next one."""
    tolerance = max(tolerance, 0.13 if dtype == FP8 else 0)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance / 2, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", [(2, 64), (3, 80), (20, 128), (1, 576)])
@pytest.mark.parametrize("kind", [None, FP8], ids=["", "fp8"])
def test_storing(dtype, heads, width, kind):
    rng = torch.Generator().manual_seed(width)
    values = torch.randn(TOKENS, 2 * heads + 1, width, generator=rng)
    if kind is not None and DEVICE.type == "cpu":  # the interpreter rounds to FP8 wrongly: nothing to round
        values = values.to(kind).float()
    k, v = values.to(DEVICE, dtype)[:, 1:].split(heads, 1)
    k[0, 0, :2] = torch.tensor([3e4, -3e4])  # beyond FP8 after its scale
    wanted, kept = poisoned(2, heads, width, kind or dtype), SLOTS >= 0
    found = wanted.clone()
    scales = dict(k_scale=0.5, v_scale=2.0)
    write_kv(wanted, k[kept], v[kept], SLOTS[kept], **scales)
    store_kv(found, k, v, SLOTS, **scales)
    same_cache(found, wanted, found.dtype, 0)
    rows = poisoned(1, heads, width, kind or dtype)
    store_kv(rows, k, None, SLOTS, k_scale=0.5)
    same_cache(rows, wanted[:1], rows.dtype, 0)
    if kind is not None:
        assert found.float().nan_to_num().abs().max() == 448
        read, _ = gather_kv(found, torch.tensor([4], device=DEVICE), 16, dtype, **scales)
        torch.testing.assert_close(read[15, :, 2:], k[0, :, 2:], rtol=0.13, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 64), (7, 1, 80), (32, 8, 128)])
@pytest.mark.parametrize("normed", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("kind", [None, pytest.param(FP8, marks=pytest.mark.gpu)], ids=["", "fp8"])
def test_rotation_in_the_same_launch(dtype, heads, kv_heads, width, normed, kind):
    rng = torch.Generator().manual_seed(heads)
    wide = torch.randn(TOKENS, (heads + 2 * kv_heads) * width + 16, generator=rng).to(DEVICE, dtype)
    qkv = wide[:, : (heads + 2 * kv_heads) * width]
    config = RopeConfig(kind="default", theta=1e4, params={}, max_position_embeddings=64)
    cos, sin = Rotary(config, width, 64, dtype=dtype, device=DEVICE)(torch.arange(TOKENS, device=DEVICE) * 9)
    norms = None
    if normed:
        norms = HeadNorms(*(torch.rand(2, width, generator=rng) + 0.5).to(DEVICE, dtype), 1e-5)
    wanted = poisoned(2, kv_heads, width, kind or dtype)
    found, settings = wanted.clone(), dict(heads=heads, norms=norms, k_scale=0.5, v_scale=2.0)
    q_wanted = rope_and_cache_reference(qkv, cos, sin, wanted, SLOTS, **settings)
    q = rope_and_cache(qkv, cos, sin, found, SLOTS, **settings)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(q, q_wanted, rtol=tolerance, atol=tolerance)
    same_cache(found, wanted, found.dtype, tolerance)


def test_no_tokens():
    cache = poisoned(2, 2, 64, torch.float16)
    empty = torch.empty(0, 8 * 64, dtype=torch.float16, device=DEVICE)
    cos = torch.empty(0, 1, 64, dtype=torch.float16, device=DEVICE)
    assert rope_and_cache(empty, cos, cos, cache, SLOTS[:0], heads=4).shape == (0, 4, 64)
    store_kv(cache, empty.view(0, 8, 64)[:, :2], empty.view(0, 8, 64)[:, :2], SLOTS[:0])
    assert cache.isnan().all()
