"""Norm, rotation and store of a latent in one launch do what plain torch does step by step."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.attention import latent_and_cache, latent_and_cache_reference
from nybble.csrc.quantize import Rounding
from nybble.csrc.scheme import Activation
from nybble.models.rope import RopeConfig, Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32"),
          pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu)]
SLOTS = torch.tensor([79, 3, -1, 16, 0, -1, 47], device=DEVICE)
TOKENS = len(SLOTS)
ROUNDINGS = {
    "": None,
    "int8": Rounding(Activation(dtype="int8", scale="token")),
    "int8 groups": Rounding(Activation(dtype="int8", scale="group", group=32)),
    "static": Rounding(Activation(dtype="int8", scale="tensor", static=True), torch.tensor(0.03, device=DEVICE)),
    "fp8": Rounding(Activation(dtype="fp8_e4m3", scale="token")),
    "fp8 groups": Rounding(Activation(dtype="fp8_e4m3", scale="group", group=128)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, nope, rotated, width", [(3, 16, 8, 48), (16, 128, 64, 512)])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("rounding", [pytest.param(name, marks=pytest.mark.gpu if name.startswith("fp8") else ())
                                      for name in ROUNDINGS])
@pytest.mark.parametrize("kind", [None, pytest.param(FP8, marks=pytest.mark.gpu)], ids=["", "fp8 cache"])
def test_one_launch_for_all(dtype, heads, nope, rotated, width, interleaved, rounding, kind):
    rng = torch.Generator().manual_seed(heads)
    down = torch.randn(TOKENS, width + rotated, generator=rng).to(DEVICE, dtype)
    q = torch.randn(TOKENS, heads * (nope + rotated), generator=rng).to(DEVICE, dtype)
    weight = (torch.rand(width, generator=rng) + 0.5).to(DEVICE, dtype)
    down[3, 1] = float("nan")
    config = RopeConfig(kind="default", theta=10000.0, max_position_embeddings=64, params={})
    rope = Rotary(config, rotated, 64, dtype=dtype, device=DEVICE)(torch.arange(TOKENS, device=DEVICE) * 7)
    found = torch.full((1, 5, 16, 1, width + rotated), 7.0, device=DEVICE).to(kind or dtype)
    wanted = found.clone()
    settings = dict(heads=heads, interleaved=interleaved, rounding=ROUNDINGS[rounding], kv_scale=0.5 if kind else 1.0)
    latent, k_pe = down.split((width, rotated), dim=-1)
    q_nope, q_pe = latent_and_cache(q, latent, k_pe, *rope, weight, 1e-6, found, SLOTS, **settings)
    expected_nope, expected_pe = latent_and_cache_reference(q, latent, k_pe, *rope, weight, 1e-6, wanted, SLOTS,
                                                            **settings)
    close = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    assert torch.equal(q_nope, expected_nope)
    torch.testing.assert_close(q_pe, expected_pe, rtol=close, atol=close)
    if rounding:  # a value near the middle of two codes may take the other one
        wanted_rows, found_rows = wanted.float().nan_to_num(9), found.float().nan_to_num(9)
        assert ((wanted_rows - found_rows).abs() > close * (1 + wanted_rows.abs())).float().mean() < 0.01
    else:
        close = max(close, 0.13 if kind else 0)
        torch.testing.assert_close(found.float(), wanted.float(), rtol=close, atol=close, equal_nan=True)
    untouched = torch.ones(80, dtype=torch.bool, device=DEVICE).index_fill_(0, SLOTS[SLOTS >= 0], False)
    assert (found.flatten(0, 3)[untouched].float() == 7).all()
