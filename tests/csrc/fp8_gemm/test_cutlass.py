"""The CUTLASS FP8 kernel: what it refuses, when it is chosen, and, on a GPU, its numerical contract at every tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.csrc import ops
from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.fp8_gemm import CutlassFp8Kernel, channel_scales
from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.ops import load_op
from nybble.csrc.quantize import Quantized, dequantize, quantize, triton_quantize
from nybble.csrc.scaled_gemm import TritonScaledKernel
from nybble.csrc.scheme import Activation, Scheme
from nybble.csrc.select import Problem, choose
from nybble.plugins.builtin import nybble_kernels

TOKEN = Activation(dtype="fp8_e4m3", scale="token")
STATIC = Activation(dtype="fp8_e4m3", scale="tensor", static=True)
PROBLEM = Problem(scheme=Scheme(code="fp8_e4m3", bits=8, activation=TOKEN), rows=200, columns=1408,
                  dtype=torch.bfloat16, device=torch.device("cuda"))
# What Hopper's tensor cores keep of an FP8 product's sum between two full additions.
BOUND = Bound(accumulate=2.0**-17)
CONFIGS = 4


@pytest.fixture
def hopper(monkeypatch):
    """hopper(8, 9, missing="why"): a device of that capability, and whether the library can be had."""
    def have(*capability, missing=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("nybble.csrc.launch.find_spec", lambda name: object())
        monkeypatch.setattr("nybble.csrc.fp8_gemm.linear.op_missing", lambda op, device: missing)

    have(9, 0)
    return have


@pytest.mark.parametrize("change, words", [
    (dict(device=torch.device("cpu")), "runs on CUDA, not on cpu"),
    (dict(dtype=torch.float32), "gives 16-bit outputs, not float32"),
    (dict(columns=1400), "needs a multiple of 16 inputs, not 1400"),
    (dict(columns=0), "needs a multiple of 16 inputs, not 0"),
    (dict(rows=204), "needs a multiple of 8 outputs, not 204"),
    (dict(even=False), "inputs must be in order"),
    (dict(scheme=dict(code="int8")), "multiplies FP8 weights by FP8 inputs"),
    (dict(scheme=dict(activation=None)), "multiplies FP8 weights by FP8 inputs"),
    (dict(scheme=dict(activation=Activation(dtype="int8", scale="token"))), "multiplies FP8 weights by FP8 inputs"),
    (dict(scheme=dict(group=128, group_rows=128)), "not by group or block"),
    (dict(scheme=dict(activation=replace(TOKEN, scale="group", group=128))), "not by group or block"),
])
def test_refusals(hopper, change, words):
    scheme = replace(PROBLEM.scheme, **change.get("scheme", {}))
    assert CutlassFp8Kernel.supports(PROBLEM) is None
    assert words in CutlassFp8Kernel.supports(replace(PROBLEM, **{**change, "scheme": scheme}))


@pytest.mark.parametrize("capability, words", [((8, 9), "needs compute capability 9.0, this device has 8.9"),
                                               ((10, 0), "for compute capability 9.0 alone, this device has 10.0")])
def test_other_devices(hopper, capability, words):
    hopper(*capability)
    assert words in CutlassFp8Kernel.supports(PROBLEM)


def test_without_the_library(hopper):
    """Triton takes its place, and the report says why."""
    known = {"cutlass_fp8": CutlassFp8Kernel, "triton_w8a8": TritonScaledKernel}
    assert choose([PROBLEM], known).chosen is CutlassFp8Kernel
    hopper(9, 0, missing="jit: no nvcc")
    choice = choose([PROBLEM], known)
    assert choice.chosen is TritonScaledKernel and choice.refusals["cutlass_fp8"] == "jit: no nvcc"


def test_registration():
    assert nybble_kernels()["cutlass_fp8"] == f"{CutlassFp8Kernel.__module__.rpartition('.')[0]}:CutlassFp8Kernel"
    assert {"fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_workspace"} <= set(ops.LIBRARIES[-1].ops)


@pytest.mark.parametrize("scale_rows, expected", [(None, [5, 6, 7]), ([0, 0, 2], [5, 5, 7]), ("one", [5, 5, 5])])
def test_scales_of_every_row(scale_rows, expected):
    one = scale_rows == "one"
    matrix = QuantizedMatrix(scheme=PROBLEM.scheme, rows=3, columns=16, codes=lambda start, stop: torch.empty(0),
                             scales=torch.tensor([[5.0]] if one else [[5.0], [6.0], [7.0]]).half(),
                             scale_rows=None if one or scale_rows is None else torch.tensor(scale_rows).int())
    assert channel_scales(matrix).tolist() == expected and channel_scales(matrix).dtype == torch.float32


@pytest.fixture
def library():
    if reason := CutlassFp8Kernel.supports(PROBLEM):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 8, 9, 15, 16, 17, 32, 33, 64, 65, 128, 129, 4100])
@pytest.mark.parametrize("n, k", [(8, 16), (200, 1408), (264, 4096)])
@pytest.mark.parametrize("tensor, activation", [(False, TOKEN), (True, STATIC)], ids=["channel-token", "tensor-static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_contract(fp8_matrix, library, m, n, k, tensor, activation, dtype):
    matrix = fp8_matrix(n, k, tensor=tensor, activation=activation, device="cuda")
    kernel = CutlassFp8Kernel(matrix, dtype)
    for kind in ("normal", "outliers", "positive"):
        x = activations(kind, m, k, dtype=dtype, device="cuda")
        bias = torch.randn(n, dtype=dtype, device="cuda") if kind == "positive" else None
        rounded = dequantize(*quantize(x, activation, matrix.input_scale), activation)
        check_product(kernel(x, bias), rounded, matrix.dequant(0, n), bias, bound=BOUND).require(kind)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("n, k", [(8, 16), (200, 1408), (264, 4096), (64, 14336)])
@pytest.mark.parametrize("activation", [TOKEN, STATIC], ids=["token", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_few_tokens_rounded_by_the_product_are_those_rounded_before(fp8_matrix, library, m, n, k, activation, dtype):
    """Bit for bit: the same codes, summed in the same order; a NaN and an infinity included."""
    matrix = fp8_matrix(n, k, tensor=False, activation=activation, device="cuda")
    kernel, x = CutlassFp8Kernel(matrix, dtype), activations("outliers", m, k, dtype=dtype, device="cuda")
    x[-1, 5], bias = (float("nan"), float("inf"))[m % 2], torch.randn(n, dtype=dtype, device="cuda")
    codes, scales = triton_quantize(x, activation, kernel.weights.get("input_scale"))
    before = kernel.run_rounded(Quantized(codes=codes, scales=scales, dtype=dtype), bias)
    assert before[-1].isnan().all() and not before[:-1].isnan().any()
    assert torch.equal(kernel(x, bias)[:-1], before[:-1]) and kernel(x, bias)[-1].isnan().all()
    rounded = dequantize(codes, scales, activation)[:-1]
    check_product(before[:-1], rounded, matrix.dequant(0, n), bias, bound=BOUND).require("few rows")


@pytest.mark.gpu
@pytest.mark.parametrize("config", range(CONFIGS))
@pytest.mark.parametrize("m", [1, 16, 77, 300])
def test_every_tile_computes_the_same_product(fp8_matrix, library, config, m):
    """One scale for all inputs as well as one a token; outputs start as NaN: every element is written."""
    n, k = 4104, 2064
    matrix = fp8_matrix(n, k, tensor=False, activation=TOKEN, device="cuda")
    x, bias = activations("normal", m, k, dtype=torch.bfloat16, device="cuda"), torch.randn(n, device="cuda").bfloat16()
    codes, scales = quantize(x, TOKEN)
    for factor in (scales, scales[:1]):
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        load_op("fp8_gemm")(out, codes, matrix.codes(0, n), factor, channel_scales(matrix), bias, config, 132)
        rounded = dequantize(codes, factor, TOKEN)
        check_product(out, rounded, matrix.dequant(0, n), bias, bound=BOUND).require(f"tile {config}")


@pytest.mark.gpu
def test_a_nan_stays_in_its_row(fp8_matrix, library):
    matrix = fp8_matrix(64, 128, tensor=False, activation=TOKEN, device="cuda")
    x = torch.ones(20, 128, dtype=torch.bfloat16, device="cuda")
    x[3, 7], x[17, 0] = float("nan"), float("inf")
    bad = CutlassFp8Kernel(matrix, torch.bfloat16)(x).isnan()
    assert bad[[3, 17]].all() and bad.sum() == 2 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 200])
def test_a_captured_graph(fp8_matrix, library, m):
    matrix = fp8_matrix(200, 1408, tensor=False, activation=TOKEN, device="cuda")
    kernel, x = CutlassFp8Kernel(matrix, torch.bfloat16), torch.randn(m, 1408, device="cuda").bfloat16()
    kernel(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(x)
    x.copy_(torch.randn(m, 1408, device="cuda"))
    graph.replay()
    assert torch.equal(out, kernel(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape, config", [((16, 24, 72), -1), ((16, 20, 64), -1), ((16, 24, 64), CONFIGS)])
def test_the_launcher_refuses(library, shape, config):
    """What the door lets pass only when it is called without `supports`."""
    (m, n, k), scale = shape, torch.ones(1, device="cuda")
    a, b = (torch.zeros(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n))
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="fp8_gemm was not built for these shapes"):
        load_op("fp8_gemm")(out, a, b, scale, scale, None, config, 132)
