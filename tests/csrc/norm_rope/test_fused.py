"""Norm, residual, gated SiLU and rounding in one launch give what the separate operations give."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.norm_rope import fused_rms_norm, fused_silu_mul, rms_norm, silu_mul
from nybble.csrc.quantize import Quantized, Rounding, quantize
from nybble.csrc.scheme import Activation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32"),
          pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu)]
SHAPES = [(0, 64), (1, 1408), (3, 4096), (5, 200)]
# The interpreter rounds to FP8 wrongly.
CODES = ["int8", pytest.param("fp8_e4m3", marks=pytest.mark.gpu)]
SCALES = ["token", "group", "static"]


def rounding_of(code: str, scale: str) -> Rounding:
    if scale == "static":
        return Rounding(Activation(dtype=code, scale="tensor", static=True), torch.tensor(0.02, device=DEVICE))
    return Rounding(Activation(dtype=code, scale=scale, group=128 if scale == "group" else None))


def close(found, wanted, dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-6)


def made(tokens, width, dtype):
    """x with rows further apart than they are long, a residual and a weight; the last token is not finite.

    Squares add up exactly in any order: no launch of another shape may round the norm otherwise.
    """
    rng = torch.Generator().manual_seed(tokens)
    wide = torch.randint(-6, 7, (tokens, width + 8), generator=rng) / 2
    if tokens > 2:
        wide[-1, 3], wide[-2] = float("inf"), 0.0
    residual, weight = torch.randint(-3, 4, (tokens, width), generator=rng) / 2, torch.randn(width, generator=rng)
    return wide.to(DEVICE, dtype)[:, :width], residual.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def same_codes(found: Quantized, values: torch.Tensor, rounding: Rounding):
    codes, scales = quantize(values, *rounding)
    assert found.dtype == values.dtype and found.codes.dtype == codes.dtype and found.codes.is_contiguous()
    finite = scales.isfinite().all(1)  # codes of a row that is no number mean nothing
    assert torch.equal(found.scales.nan_to_num(-1), scales.nan_to_num(-1))
    assert torch.equal(found.codes[finite].float(), codes[finite].float())


@pytest.mark.parametrize("tokens, width", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_norm(tokens, width, dtype, added):
    x, residual, weight = made(tokens, width, dtype)
    before = residual.clone()
    found, total = fused_rms_norm(x, weight, 1e-5, residual if added else None)
    wanted, wanted_total = rms_norm(x, weight, 1e-5, residual if added else None)
    assert torch.equal(total, wanted_total) and torch.equal(residual, before)
    torch.testing.assert_close(found.isnan(), wanted.isnan())
    close(found.nan_to_num(), wanted.nan_to_num(), dtype)


@pytest.mark.parametrize("tokens, width", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_rounded_norm_is_the_rounded_norm(tokens, width, dtype, code, scale):
    x, residual, weight = made(tokens, width, dtype)
    rounding = rounding_of(code, scale)
    plain, _ = fused_rms_norm(x, weight, 1e-5, residual)
    found, total = fused_rms_norm(x, weight, 1e-5, residual, rounding)
    assert torch.equal(total, x + residual)
    same_codes(found, plain, rounding)


def test_heads_are_rows():
    """As the queries and keys of a fused product lie, and the parts of one."""
    qkv = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = torch.rand(16, device=DEVICE)
    for part in qkv.split((4, 2), dim=1):
        close(fused_rms_norm(part, weight, 1e-6)[0], rms_norm(part, weight, 1e-6)[0], torch.float32)


@pytest.mark.parametrize("tokens, width", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu(tokens, width, dtype):
    x = made(tokens, 2 * width, dtype)[0]
    torch.testing.assert_close(fused_silu_mul(x).isnan(), silu_mul(x).isnan())
    close(fused_silu_mul(x).nan_to_num(), silu_mul(x).nan_to_num(), dtype)


@pytest.mark.parametrize("tokens, width", [*SHAPES, pytest.param(2, 14336, marks=pytest.mark.gpu),
                                           pytest.param(3, 40000, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_rounded_silu_is_the_rounded_silu(tokens, width, dtype, code, scale):
    x, rounding = made(tokens, 2 * width, dtype)[0], rounding_of(code, scale)
    same_codes(fused_silu_mul(x, rounding), fused_silu_mul(x), rounding)
