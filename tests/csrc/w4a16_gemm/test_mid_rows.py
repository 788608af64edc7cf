"""Some to some hundred tokens by 4-bit codes on Hopper: the numerical contract, splits of the inputs, who is asked."""

from __future__ import annotations

import pytest
import torch

from nybble.bench.kernels import random_matrix
from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.ops import op_missing
from nybble.csrc.scheme import Scheme
from nybble.csrc.w4a16_gemm import TritonW4A16Kernel, mid_rows
from nybble.csrc.w4a16_gemm.mid_rows import splits_of

DEVICE = torch.device("cuda")
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture
def kernel_of(monkeypatch):
    """kernel_of(...) -> the kernel, which asks this one wherever it can, and what the matrix stands for."""
    if torch.cuda.get_device_capability()[0] != mid_rows.HOPPER:
        pytest.skip("multiplies by Hopper's tensor cores")
    if (reason := op_missing("w4_mid_rows", DEVICE)) is not None:
        pytest.skip(reason)

    monkeypatch.setattr(mid_rows, "FILLED", 0)

    def kernel_of(scheme, rows, columns, dtype, seed=0):
        matrix = random_matrix(scheme, rows, columns, DEVICE, seed=seed)
        kernel = TritonW4A16Kernel(matrix, dtype)
        assert kernel.mid_rows is not None
        return kernel, matrix.dequant(0, rows)

    return kernel_of


def scheme_of(group, zeros, order=False):
    return Scheme(code="uint", bits=4, group=group, zero_point=zeros, act_order=order)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group, zeros, order", [(128, True, False), (128, False, True), (256, True, False),
                                                 (None, False, False)])
@pytest.mark.parametrize("m", [17, 32, 33, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("n, k", [(72, 1408), (320, 256), (1000, 4096), (4096, 144)])
def test_contract(kernel_of, dtype, group, zeros, order, m, n, k):
    if order:
        k = -(-k // group) * group  # groups of equal sizes
    kernel, dense = kernel_of(scheme_of(group, zeros, order), n, k, dtype)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, m, k, dtype=dtype, device=DEVICE)
        bias = torch.randn(n, dtype=dtype, device=DEVICE) if kind == "positive" else None
        check_product(kernel(x, bias), x, dense, bias, bound=Bound()).require(kind)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [20, 60, 200])
@pytest.mark.parametrize("splits", [1, 2, 4, 6])
def test_splits_give_what_one_pass_gives(kernel_of, monkeypatch, m, splits):
    """In order, again and again."""
    kernel, dense = kernel_of(scheme_of(128, True), 600, 1408, torch.bfloat16)
    monkeypatch.setattr(mid_rows, "splits_of", lambda *_: splits)
    x = activations("normal", m, 1408, dtype=torch.bfloat16, device=DEVICE)
    found = [kernel(x) for _ in range(5)]
    check_product(found[0], x, dense, bound=Bound()).require()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.gpu
def test_which_numbers_of_tokens_it_takes(kernel_of):
    kernel, _ = kernel_of(scheme_of(128, True), 64, 256, torch.bfloat16)
    asked, op = [], kernel.mid_rows
    kernel.mid_rows = lambda out, *rest: (asked.append(len(out)), op(out, *rest))
    for tokens in (16, 17, mid_rows.MID_TOKENS, mid_rows.MID_TOKENS + 1):
        kernel(torch.zeros(tokens, 256, dtype=torch.bfloat16, device=DEVICE))
    assert asked == [17, mid_rows.MID_TOKENS]


@pytest.mark.parametrize("tokens, rows, blocks, expected", [
    (17, 28672, 32, 1), (64, 28672, 32, 1), (256, 28672, 32, 1), (257, 28672, 32, None), (32, 6144, 32, None),
    (128, 6144, 32, 2), (256, 6144, 32, 1), (128, 4096, 112, None), (256, 4096, 112, 2), (256, 4096, 1, None)])
def test_where_it_is_taken_and_how_inputs_are_split(tokens, rows, blocks, expected):
    """Llama-3-8B's layers, on 132 multiprocessors."""
    assert splits_of(tokens, rows, blocks, 132) == expected
