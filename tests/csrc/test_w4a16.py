"""Kernels for 2, 3, 4 and 8-bit weights keep the numerical contract at odd shapes, on CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.contract import Bound, activations, check_product, random_codes
from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.scheme import Scheme
from nybble.csrc.w4a16_gemm import TritonW4A16Kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter truncates to bfloat16 where the GPU rounds.
DTYPES = {"fp16": torch.float16, **({"bf16": torch.bfloat16} if DEVICE.type == "cuda" else {})}


def matrix_of(n: int, k: int, bits: int, group: int | None, *, zeros: bool, order: bool = False):
    """A random matrix, and what its codes stand for."""
    codes = random_codes(n, k, bits=bits, group=group or k, dtype=torch.float16, device=DEVICE)
    raw, zero = codes.codes.to(torch.uint8), codes.zeros.to(torch.uint8)
    groups = None
    if order:
        shuffle = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(DEVICE)
        groups = (torch.arange(k, device=DEVICE) // group)[shuffle].int()
    matrix = QuantizedMatrix(
        scheme=Scheme(code="uint", bits=bits, group=group, zero_point=zeros, act_order=order), rows=n, columns=k,
        codes=lambda start, stop: raw[start:stop], scales=codes.scales, zeros=zero if zeros else None, groups=groups)
    return matrix, matrix.dequant(0, n)


@pytest.mark.parametrize("bits, group, zeros, order", [
    (4, 128, False, False), (4, 128, True, True), (4, 32, True, False), (4, None, False, False),
    (3, 64, True, False), (3, 32, False, False), (2, 64, True, False), (8, 128, False, True), (8, None, True, False),
])
@pytest.mark.parametrize("m, n, k", [(1, 72, 1408), (17, 200, 256), (0, 64, 128)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_contract(m, n, k, bits, group, zeros, order, dtype):
    matrix, weight = matrix_of(n, k, bits, group, zeros=zeros, order=order)
    kernel = TritonW4A16Kernel(matrix, dtype)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, m, k, dtype=dtype, device=DEVICE)
        bias = torch.randn(n, dtype=dtype, device=DEVICE) if kind == "positive" else None
        check_product(kernel(x, bias), x, weight, bias, bound=Bound()).require(kind)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="addresses are seen in the interpreter alone")
def test_no_codes_are_read_beyond_the_last(monkeypatch):
    """65 tokens take tiles of 128 outputs, and 64 outputs have one strip of codes."""
    from triton.runtime import interpreter

    matrix, weight = matrix_of(64, 256, 4, 128, zeros=False)
    kernel, beyond = TritonW4A16Kernel(matrix, torch.float16), []
    codes = kernel.weights["codes"]
    longer = torch.cat([codes.flatten(), codes.flatten()])  # what lies behind them is nobody else's
    kernel.weights["codes"] = longer[: codes.numel()].view(codes.shape)
    last, end = longer.data_ptr() + codes.numel(), longer.data_ptr() + longer.numel()
    load = interpreter.InterpreterBuilder.create_masked_load

    def watch(builder, pointers, mask, *rest):
        read = pointers.data[mask.data]
        beyond.append(int(((read >= last) & (read < end)).sum()))
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watch)
    x = activations("normal", 65, 256, dtype=torch.float16)
    check_product(kernel(x), x, weight, bound=Bound()).require()
    assert beyond and not any(beyond)
