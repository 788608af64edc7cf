"""Many tokens in FP8 by torch: what decides it, what it is given, and its numerical contract."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.fp8_gemm import CutlassFp8Kernel, linear, many_rows
from nybble.csrc.fp8_gemm.many_rows import MANY_TOKENS, cublas_has_rows, fits, multiply, rowwise_missing
from nybble.csrc.quantize import Quantized, dequantize, quantize
from nybble.csrc.scheme import Activation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKEN = Activation(dtype="fp8_e4m3", scale="token")
STATIC = Activation(dtype="fp8_e4m3", scale="tensor", static=True)
# What Hopper's tensor cores keep of an FP8 product's sum between two full additions.
BOUND = Bound(accumulate=2.0**-17)


@pytest.fixture(autouse=True)
def asked_anew():
    rowwise_missing.cache_clear()
    yield
    rowwise_missing.cache_clear()


@pytest.fixture
def torch_has_it():
    if reason := rowwise_missing(DEVICE):
        pytest.skip(reason)


@pytest.mark.parametrize("cuda, has", [(None, False), ("11.8", False), ("12.8", False), ("12.9", True),
                                       ("13.0", True)])
def test_versions(cuda, has):
    assert cublas_has_rows(cuda) == has


def test_what_torch_cannot_is_cutlass(monkeypatch):
    monkeypatch.setattr(many_rows, "multiply", lambda *args: None)
    assert fits(32, torch.bfloat16, torch.device("cpu"))
    assert not fits(24, torch.bfloat16, torch.device("cpu")) and not fits(32, torch.float16, torch.device("cpu"))


def test_a_refusal_is_told_once(monkeypatch, caplog):
    def refuse(*args):
        raise RuntimeError("no such product\nand a trace")

    monkeypatch.setattr(many_rows, "multiply", refuse)
    with caplog.at_level("WARNING", "nybble"):
        assert not fits(32, torch.bfloat16, torch.device("cpu")) and not fits(64, torch.bfloat16, torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "many tokens in FP8 do without torch's product: no such product"]


@pytest.mark.parametrize("n, k", [(32, 64), (208, 1408)])
@pytest.mark.parametrize("tensor, activation", [(False, TOKEN), (True, STATIC)], ids=["channel-token", "tensor-static"])
def test_the_kernel_gives_torch_its_rows(fp8_matrix, torch_has_it, monkeypatch, n, k, tensor, activation):
    """From MANY_TOKENS on the product is torch's and keeps the contract; one token fewer is CUTLASS's."""
    compiled = []
    monkeypatch.setattr(linear, "load_op", lambda op: lambda out, *rest: compiled.append(len(out)))
    monkeypatch.setattr(linear, "optional_op", lambda op, device: None)
    matrix = fp8_matrix(n, k, tensor=tensor, activation=activation, device=DEVICE)
    kernel = CutlassFp8Kernel(matrix, torch.bfloat16)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, MANY_TOKENS + 3, k, dtype=torch.bfloat16, device=DEVICE)
        bias = torch.randn(n, dtype=torch.bfloat16, device=DEVICE) if kind == "positive" else None
        codes, scales = quantize(x, activation, matrix.input_scale)
        rounded = Quantized(codes=codes, scales=scales, dtype=torch.bfloat16)
        check_product(kernel.run_rounded(rounded, bias), dequantize(codes, scales, activation), matrix.dequant(0, n),
                      bias, bound=BOUND).require(kind)
    few = slice(MANY_TOKENS - 1)
    kernel.run_rounded(Quantized(codes=codes[few], scales=scales[few], dtype=torch.bfloat16))
    assert compiled == [MANY_TOKENS - 1]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [MANY_TOKENS, 1000, 4096])
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336)])
def test_contract_at_real_shapes(fp8_matrix, torch_has_it, m, n, k):
    """Values of one sign too, whose long sums show an accumulator that is never emptied."""
    matrix = fp8_matrix(n, k, tensor=False, activation=TOKEN, device=DEVICE)
    dense, weights = matrix.dequant(0, n), matrix.codes(0, n)
    for kind in ("normal", "outliers", "positive"):
        codes, scales = quantize(activations(kind, m, k, dtype=torch.bfloat16, device=DEVICE), TOKEN)
        out = multiply(Quantized(codes=codes, scales=scales, dtype=torch.bfloat16), weights, matrix.scales[:, 0], None)
        check_product(out, dequantize(codes, scales, TOKEN), dense, bound=BOUND).require(kind)


@pytest.mark.gpu
def test_a_nan_stays_in_its_row(fp8_matrix, torch_has_it):
    matrix = fp8_matrix(64, 128, tensor=False, activation=TOKEN, device=DEVICE)
    x = torch.ones(MANY_TOKENS, 128, dtype=torch.bfloat16, device=DEVICE)
    x[3, 7], x[17, 0] = float("nan"), float("inf")
    codes, scales = quantize(x, TOKEN)
    bad = multiply(Quantized(codes=codes, scales=scales, dtype=x.dtype), matrix.codes(0, 64), matrix.scales[:, 0],
                   None).isnan()
    assert bad[[3, 17]].all() and bad.sum() == 2 * 64
