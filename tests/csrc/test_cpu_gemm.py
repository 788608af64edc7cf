"""torch's packed products: each keeps the contract for every problem it takes, and refuses the others with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.contract import Bound, check_product
from nybble.csrc.cpu_gemm import STRIP, CpuInt4Kernel, CpuInt8Int8Kernel, CpuInt8Kernel
from nybble.csrc.quantize import dequantize, quantize
from nybble.csrc.scheme import Activation, Scheme
from nybble.csrc.select import Problem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8 = Activation(dtype="int8", scale="token")
STATIC = Activation(dtype="int8", scale="tensor", static=True)
FLOAT = st.sampled_from([BF16, F16, F32])
SPREAD = st.sampled_from(["rows", "one", "blocks"])
# What lies near each kernel's problems: most are taken, each reason to refuse comes up.
NEAR = {
    CpuInt4Kernel: st.fixed_dictionaries(dict(
        bits=st.sampled_from([4, 4, 4, 3]), rows=st.sampled_from([16, 48, 48, 24]), zeros=st.booleans(), scales=SPREAD,
        columns=st.sampled_from([128, 256, 512, 520]), group=st.sampled_from([None, 32, 64, 128, 128, 256, 16]),
        order=st.booleans(), even=st.sampled_from([True, True, False]))),
    CpuInt8Kernel: st.fixed_dictionaries(dict(
        code=st.sampled_from(["uint", "int8", "fp8_e4m3"]), rows=st.integers(1, 50),
        columns=st.sampled_from([16, 64, 208, 1, 100]), group=st.sampled_from([None, 300, 64]),
        order=st.booleans(), scales=SPREAD)),
    CpuInt8Int8Kernel: st.fixed_dictionaries(dict(
        code=st.sampled_from(["int8", "int8", "uint"]), rows=st.integers(1, 50), columns=st.integers(1, 300),
        activation=st.sampled_from([INT8, STATIC, None]), scales=SPREAD)),
}


def bound_of(kernel, dtype: torch.dtype) -> Bound:
    if kernel is CpuInt8Int8Kernel:  # exact sums, scaled in float32, rounded once
        return Bound()
    return Bound(weights=dtype, late_bias=True)  # int8 scales its sums by a scale of the dtype


@pytest.mark.parametrize("kernel", NEAR, ids=lambda kernel: kernel.name)
def test_it_computes_what_it_takes(make_matrix, inputs, kernel):
    taken = []

    @settings(deadline=None, max_examples=120, derandomize=True)
    @given(form=NEAR[kernel], m=st.sampled_from([0, 1, 5, 17]), dtype=FLOAT, scales=st.sampled_from([F16, BF16, F32]))
    def check(form, m, dtype, scales):
        matrix, _, weight = make_matrix(dtype=scales, **form)
        problem = Problem.of(matrix, dtype)
        if kernel.supports(problem) is not None:
            return
        taken.append(problem)
        packed = kernel(matrix, dtype)
        for kind, x, bias in inputs(m, matrix.rows, matrix.columns, dtype):
            if (activation := matrix.scheme.activation) is None:
                multiplied = x
            else:
                multiplied = dequantize(*quantize(x, activation, matrix.input_scale), activation)
            out = packed(x, bias)
            check_product(out, multiplied, weight, bias, bound=bound_of(kernel, dtype)).require(f"{kind} {problem}")
            assert out.dtype == dtype

    check()
    assert len(taken) >= 10
    assert {problem.dtype for problem in taken} == {BF16, F16} | ({F32} if kernel is CpuInt8Int8Kernel else set())


FIELDS = dict(rows=32, columns=256, dtype=F16, device=torch.device("cpu"))
TAKES = {
    CpuInt4Kernel: Problem(scheme=Scheme(code="uint", bits=4, group=64), **FIELDS),
    CpuInt8Kernel: Problem(scheme=Scheme(code="uint", bits=8), **FIELDS),
    CpuInt8Int8Kernel: Problem(scheme=Scheme(code="int8", bits=8, activation=INT8), **FIELDS),
}


@pytest.mark.parametrize("kernel, change, words", [
    *[(kernel, dict(device=torch.device("cuda")), "runs on CPU, not on cuda") for kernel in TAKES],
    (CpuInt4Kernel, dict(scheme=dict(bits=8)), "multiplies 4-bit weights by inputs that are not quantized"),
    (CpuInt4Kernel, dict(scheme=dict(code="int8")), "multiplies 4-bit weights"),
    (CpuInt4Kernel, dict(scheme=dict(activation=INT8)), "inputs that are not quantized"),
    (CpuInt4Kernel, dict(dtype=F32), "its float32 path is scalar code"),
    (CpuInt4Kernel, dict(scheme=dict(zero_point=True), dtype=BF16), "keeps zero points in bfloat16"),
    (CpuInt4Kernel, dict(scheme=dict(group=16)), "whole groups of 32, 64, 128, 256 inputs, not 16 of 256"),
    (CpuInt4Kernel, dict(columns=200), "not 64 of 200"),
    (CpuInt4Kernel, dict(scheme=dict(group=None), columns=200), "not 200 of 200"),
    (CpuInt4Kernel, dict(even=False), "needs whole groups"),
    (CpuInt4Kernel, dict(scale_rows=True), "needs scales for each row"),
    (CpuInt4Kernel, dict(rows=40), "a multiple of 16 outputs, not 40"),
    (CpuInt8Kernel, dict(scheme=dict(bits=4)), "multiplies 8-bit integer weights"),
    (CpuInt8Kernel, dict(scheme=dict(code="fp8_e4m3")), "multiplies 8-bit integer weights"),
    (CpuInt8Kernel, dict(scheme=dict(activation=INT8)), "inputs that are not quantized"),
    (CpuInt8Kernel, dict(dtype=F32), "its float32 path is scalar code"),
    (CpuInt8Kernel, dict(scheme=dict(zero_point=True)), "one scale for each row and no zero points"),
    (CpuInt8Kernel, dict(scheme=dict(group=128)), "one scale for each row and no zero points"),
    (CpuInt8Kernel, dict(columns=200), "a multiple of 16 inputs, not 200"),
    (CpuInt8Kernel, dict(scale_rows=True), "one scale for each row and no zero points"),
    (CpuInt8Int8Kernel, dict(scheme=dict(code="uint")), "multiplies int8 weights by int8 inputs"),
    (CpuInt8Int8Kernel, dict(scheme=dict(activation=None)), "multiplies int8 weights by int8 inputs"),
    (CpuInt8Int8Kernel, dict(scheme=dict(activation=Activation(dtype="fp8_e4m3", scale="token"))), "by int8 inputs"),
    (CpuInt8Int8Kernel, dict(scheme=dict(group=64)), "one scale for each row of the weight and each row of the input"),
    (CpuInt8Int8Kernel, dict(scheme=dict(activation=Activation(dtype="int8", scale="group", group=64))),
     "each row of the input"),
    (CpuInt8Int8Kernel, dict(scale_rows=True), "one scale for each row of the weight"),
    (CpuInt8Int8Kernel, dict(columns=1), "of a single input is wrong"),
    (CpuInt8Int8Kernel, dict(columns=131072), "sums of 131072 products may not fit int32"),
])
def test_refusals(kernel, change, words):
    problem = TAKES[kernel]
    assert kernel.supports(problem) is None
    scheme = replace(problem.scheme, **change.get("scheme", {}))
    assert words in kernel.supports(replace(problem, **{**change, "scheme": scheme}))


def test_sums_that_just_fit():
    assert CpuInt8Int8Kernel.supports(replace(TAKES[CpuInt8Int8Kernel], columns=131071)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [INT8, STATIC], ids=["token", "static"])
def test_what_is_no_number_stays_none(make_matrix, activation, bad):
    matrix, _, _ = make_matrix("int8", rows=20, columns=100, activation=activation)
    x = torch.ones(3, 100)
    x[1, 99] = bad
    out = CpuInt8Int8Kernel(matrix, F32)(x, torch.ones(20))
    assert out.isnan().all(1).tolist() == [False, True, False] and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kernel, form", [
    (CpuInt4Kernel, dict(bits=4, group=32, order=True)), (CpuInt8Kernel, dict(code="uint", order=True)),
    (CpuInt8Int8Kernel, dict(code="int8", activation=INT8)),
], ids=["int4", "int8", "int8_int8"])
@pytest.mark.parametrize("shape", [(2, 3, 128), (128,), (2, 0, 128)], ids=["3-D", "1-D", "3-D without tokens"])
def test_inputs_of_any_rank(make_matrix, kernel, form, shape):
    packed = kernel(make_matrix(rows=32, columns=128, **form)[0], BF16)
    x, bias = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16), torch.ones(32, dtype=BF16)
    out = packed(x, bias)
    assert out.shape == (*shape[:-1], 32)
    assert torch.equal(out.reshape(-1, 32), packed(x.reshape(-1, 128), bias))


def test_strips_are_one_matrix(make_matrix):
    """Codes are packed some outputs at a time; the last strip may be short."""
    matrix, _, weight = make_matrix(bits=4, rows=2 * STRIP + 80, columns=128, group=32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(BF16)
    check_product(CpuInt4Kernel(matrix, BF16)(x), x, weight, bound=bound_of(CpuInt4Kernel, BF16)).require()


@pytest.mark.parametrize("kernel, form", [(CpuInt4Kernel, dict(bits=4, group=128)), (CpuInt8Kernel, dict(bits=8))],
                         ids=["int4", "int8"])
@pytest.mark.parametrize("scales", [F16, F32], ids=["fp16 scales", "fp32 scales"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_errors_that_add_up(make_matrix, kernel, form, scales, dtype):
    """Products of one sign, so that the rounding of a scale to the input's dtype is nowhere averaged out."""
    for seed in range(10):
        matrix, codes, _ = make_matrix(rows=64, columns=256, dtype=scales, seed=seed, **form)
        codes.fill_(2 ** form["bits"] - 1)
        x = torch.rand(4, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
        bound = bound_of(kernel, dtype)
        check_product(kernel(matrix, dtype)(x), x, matrix.dequant(0, 64), bound=bound).require()


@pytest.mark.parametrize("kernel, form", [
    (CpuInt4Kernel, dict(bits=4, group=64)), (CpuInt8Kernel, dict(code="int8")),
    (CpuInt8Int8Kernel, dict(code="int8", activation=INT8)),
], ids=lambda value: getattr(value, "name", ""))
def test_inputs_may_lie_anyhow(make_matrix, kernel, form):
    """Slices of columns, other strides, one token without a batch: the same bits as a copy in order."""
    matrix, _, _ = make_matrix(rows=32, columns=128, **form)
    packed, x = kernel(matrix, BF16), torch.randn(256, 8, generator=torch.Generator().manual_seed(0)).to(BF16).T
    for odd in (x[:, 64:192], x.contiguous()[:, :128], x[:, :128].unflatten(0, (2, 4)), x[:1, :128].expand(3, 128),
                x[0, :128]):
        assert torch.equal(packed(odd), packed(odd.contiguous()))
