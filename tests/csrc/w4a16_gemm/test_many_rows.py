"""Many tokens by packed codes: dequantized weights bit for bit, the pieces they come in, and the numerical contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.bench.kernels import random_matrix
from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.scheme import Scheme
from nybble.csrc.w4a16_gemm import TritonW4A16Kernel, many_rows
from nybble.csrc.w4a16_gemm.many_rows import MANY_TOKENS, PRODUCT_ROWS, dequantize, rows_at_once

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter truncates to bfloat16 where the GPU rounds.
DTYPES = {"fp16": torch.float16, **({"bf16": torch.bfloat16} if DEVICE.type == "cuda" else {})}
KINDS = [(4, 128, False, False), (4, 128, True, True), (4, 32, True, False), (4, None, False, False),
         (3, 64, True, False), (3, 32, False, True), (2, 64, True, False), (8, 128, False, True),
         (8, None, True, False)]


@pytest.fixture
def make(make_matrix):
    """make(...) -> a matrix, and what it stands for."""
    def there(tensor):
        return None if tensor is None else tensor.to(DEVICE)

    def made(**settings):
        matrix, codes, dense = make_matrix(dtype=torch.float16, **settings)
        codes = codes.to(DEVICE)
        return replace(matrix, codes=lambda start, stop: codes[start:stop], scales=there(matrix.scales),
                       zeros=there(matrix.zeros), groups=there(matrix.groups)), dense.to(DEVICE)

    return made


@pytest.mark.parametrize("bits, group, zeros, order", KINDS)
@pytest.mark.parametrize("rows, columns", [(70, 300), (64, 256), (130, 129)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_weight_is_rounded_once(make, bits, group, zeros, order, rows, columns, dtype):
    """Two matrices side by side; nothing is written between or behind them."""
    kernels, expected = [], []
    for seed in range(2):
        matrix, dense = make(bits=bits, rows=rows, columns=columns, group=group, zeros=zeros, order=order, seed=seed)
        kernels.append(TritonW4A16Kernel(matrix, dtype))
        expected.append((dense if matrix.order is None else dense[:, matrix.order]).to(dtype))  # in stored order
    codes, scales, *zero = (torch.stack([kernel.weights[name] for kernel in kernels])
                            for name in ("codes", "scales", "zeros") if name in kernels[0].weights)
    out = torch.full((2, rows + 1, columns), float("nan"), dtype=dtype, device=DEVICE)
    dequantize(codes, scales, zero[0] if zero else None, out[:, :rows], kernels[0].form)
    assert torch.equal(out[:, :rows], torch.stack(expected)) and out[:, rows].isnan().all()


@pytest.mark.parametrize("bits, group, zeros, order", KINDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_contract(make, monkeypatch, bits, group, zeros, order, dtype):
    """In pieces, the last of them short."""
    n, k = PRODUCT_ROWS + 72, 384
    monkeypatch.setattr(many_rows, "SCRATCH", PRODUCT_ROWS * k * 2)
    matrix, dense = make(bits=bits, rows=n, columns=k, group=group, zeros=zeros, order=order)
    kernel = TritonW4A16Kernel(matrix, dtype)
    assert rows_at_once(n, k * 2) < n
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, MANY_TOKENS, k, dtype=dtype, device=DEVICE)
        bias = torch.randn(n, dtype=dtype, device=DEVICE) if kind == "positive" else None
        out = kernel(x, bias)
        check_product(out, x, dense, bias, bound=Bound(weights=dtype)).require(kind)
        assert not check_product(out, x, dense, bias, bound=Bound()).ok  # the rounding must be declared


def test_from_how_many_tokens_on(make, monkeypatch):
    """One token fewer takes the kernel that unpacks as it multiplies, whose weights are not rounded."""
    asked = []
    monkeypatch.setattr("nybble.csrc.w4a16_gemm.linear.multiply", lambda x, *rest: asked.append(len(x)))
    kernel = TritonW4A16Kernel(make(bits=4, rows=64, columns=128, group=128)[0], torch.float16)
    for tokens in (MANY_TOKENS - 1, MANY_TOKENS):
        kernel(torch.zeros(1, tokens, 128, dtype=torch.float16, device=DEVICE))
    assert asked == [MANY_TOKENS]


@pytest.mark.parametrize("rows, columns", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (70, 64),
                                           (8192, 29568), (151936, 3584), (8192, 2**20)])
def test_pieces(rows, columns):
    """Whole tiles, within the scratch unless one tile is not, and none much smaller than the others."""
    step = rows_at_once(rows, 2 * columns)
    pieces = -(-rows // step)
    assert step % PRODUCT_ROWS == 0 and (step == PRODUCT_ROWS or step * 2 * columns <= many_rows.SCRATCH)
    assert pieces * step - rows < pieces * PRODUCT_ROWS
    assert pieces == 1 or rows * 2 * columns > many_rows.SCRATCH


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("m", [MANY_TOKENS, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_contract_at_real_shapes(m, n, k, dtype):
    """Where cuBLAS may split long sums: it must not add the parts up in 16 bits."""
    matrix = random_matrix(Scheme(code="uint", bits=4, group=128, zero_point=True), n, k, DEVICE)
    kernel, dense = TritonW4A16Kernel(matrix, dtype), matrix.dequant(0, n)
    for kind in ("normal", "outliers"):
        x = activations(kind, m, k, dtype=dtype, device=DEVICE)
        check_product(kernel(x), x, dense, bound=Bound(weights=dtype)).require(kind)
