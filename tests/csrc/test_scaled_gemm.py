"""Kernels for FP8 and int8 weights keep the numerical contract at odd shapes, on CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.quantize import dequantize, quantize, triton_quantize
from nybble.csrc.scaled_gemm import TritonScaledKernel, TritonWeightOnlyKernel
from nybble.csrc.scheme import Activation, Scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter truncates to bfloat16 where the GPU rounds.
DTYPES = {"fp16": torch.float16, **({"bf16": torch.bfloat16} if DEVICE.type == "cuda" else {})}
SHAPES = [(0, 64, 128), (1, 72, 1408), (17, 200, 260), (66, 136, 256)]
# What Hopper's tensor cores keep of an FP8 product's sum between two full additions.
FP8_BOUND = Bound(accumulate=2.0**-17)


def matrix_of(n: int, k: int, code: str, *, block: tuple[int, int] | None, activation: Activation | None):
    """Random codes with a scale for each row, or each block; blocks start anew at row n // 3, as in a fused layer."""
    rng = torch.Generator().manual_seed(n * k)
    if code == "int8":
        codes = torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8)
    else:
        codes = (torch.randn(n, k, generator=rng) * 40).to(torch.float8_e4m3fn)
    codes, scale_rows, rows, columns = codes.to(DEVICE), None, n, 1
    if block is not None:
        first = torch.arange(n // 3) // block[0]
        scale_rows = torch.cat([first, first[-1] + 1 + torch.arange(n - n // 3) // block[0]]).int().to(DEVICE)
        rows, columns = int(scale_rows[-1]) + 1, -(-k // block[1])
    scales = (torch.rand(rows, columns, generator=rng) + 0.5).to(DEVICE) / 2000
    static = activation is not None and activation.static
    return QuantizedMatrix(
        scheme=Scheme(code=code, bits=8, group=block and block[1], activation=activation), rows=n, columns=k,
        codes=lambda start, stop: codes[start:stop], scales=scales, scale_rows=scale_rows,
        input_scale=torch.tensor(0.013, device=DEVICE) if static else None)


@pytest.fixture(autouse=True)
def rounding(request, monkeypatch):
    """Triton's interpreter loses the carry into the exponent when it rounds to FP8: the reference rounds there."""
    if DEVICE.type == "cpu":
        if "quantize" in request.node.name and "fp8" in request.node.name:
            pytest.skip("rounding to FP8 needs a GPU")
        monkeypatch.setattr("nybble.csrc.scaled_gemm.linear.triton_quantize", quantize)


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("code", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("block", [None, (128, 128), (1, 32)], ids=["rows", "blocks", "groups"])
@pytest.mark.parametrize("scale", ["token", "group", "static"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounded_inputs(m, n, k, code, block, scale, dtype):
    """The product is that of the codes, whatever they were rounded from."""
    activation = Activation(dtype=code, scale="tensor" if scale == "static" else scale, static=scale == "static",
                            group=128 if scale == "group" else None)
    matrix = matrix_of(n, k, code, block=block, activation=activation)
    kernel = TritonScaledKernel(matrix, dtype)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, m, k, dtype=dtype, device=DEVICE)
        bias = torch.randn(n, dtype=dtype, device=DEVICE) if kind == "positive" else None
        rounded = dequantize(*quantize(x, activation, matrix.input_scale), activation)
        bound = FP8_BOUND if code == "fp8_e4m3" else Bound()
        check_product(kernel(x, bias), rounded, matrix.dequant(0, n), bias, bound=bound).require(kind)


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("code", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("block", [None, (128, 128)], ids=["rows", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weight_only(m, n, k, code, block, dtype):
    matrix = matrix_of(n, k, code, block=block, activation=None)
    kernel = TritonWeightOnlyKernel(matrix, dtype)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, m, k, dtype=dtype, device=DEVICE)
        check_product(kernel(x), x, matrix.dequant(0, n), bound=Bound()).require(kind)


@pytest.mark.parametrize("block", [None, (128, 128)], ids=["rows", "blocks"])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_a_device_without_fp8(m, n, k, block, monkeypatch):
    """The codes are decoded by hand where Triton has no such type."""
    monkeypatch.setattr("nybble.csrc.scaled_gemm.linear.lacks_fp8", lambda device: True)
    matrix = matrix_of(n, k, "fp8_e4m3", block=block, activation=None)
    kernel = TritonWeightOnlyKernel(matrix, torch.float16)
    assert kernel.weights["codes"].dtype == torch.int8
    x = activations("normal", m, k, dtype=torch.float16, device=DEVICE)
    check_product(kernel(x), x, matrix.dequant(0, n), bound=Bound()).require("normal")


@pytest.mark.parametrize("m, k", [(0, 64), (1, 1), (3, 1408), (5, 200), (2, 5000)])
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("group, static", [(None, False), (128, False), (48, False), (None, True)])
def test_quantize(m, k, dtype, group, static):
    """Bit for bit what the reference gives, NaN and infinity included."""
    activation = Activation(dtype=dtype, scale="tensor" if static else "group" if group else "token", static=static,
                            group=group)
    scale = torch.tensor(0.017, device=DEVICE) if static else None
    x = activations("outliers", m, k, dtype=torch.float16, seed=k, device=DEVICE)
    if m > 1:
        x[0, k // 2], x[1, 0], x[1, k - 1] = float("nan"), float("inf"), 0
    codes, scales = triton_quantize(x, activation, scale)
    expected, expected_scales = quantize(x, activation, scale)
    torch.testing.assert_close(scales, expected_scales.reshape(scales.shape), rtol=0, atol=0, equal_nan=True)
    good = dequantize(expected, expected_scales, activation).isfinite()  # codes beside a NaN scale say nothing
    assert torch.equal(codes.float()[good], expected.float()[good])
