"""Experts' rows: sorted, scattered, added up; and, on a GPU, the grouped product by the numerical contract."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.fp8_gemm import cutlass_missing
from nybble.csrc.moe_gemm import grouped
from nybble.csrc.moe_gemm.grouped import GroupedFp8, Rows, add_rows, scatter_quantized, silu_quantized, sort_slots
from nybble.csrc.ops import load_op
from nybble.csrc.quantize import dequantize, quantize
from nybble.csrc.scheme import Activation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKEN = Activation(dtype="fp8_e4m3", scale="token")
BOUND = Bound(accumulate=2.0**-17)
CONFIGS = 3


@pytest.mark.parametrize("slots, top_k, count", [(1, 1, 4), (300, 2, 7), (2500, 4, 128), (64, 1, 1), (5, 5, 200)])
def test_rows_are_sorted_by_expert_and_token(slots, top_k, count):
    rng = torch.Generator().manual_seed(slots)
    experts = torch.randint(-1, count, (slots // top_k, top_k), generator=rng).to(DEVICE)
    rows = sort_slots(experts, count)
    flat = experts.flatten()
    order = flat.argsort(stable=True)[(flat < 0).sum():]
    expected = torch.full_like(flat, -1)
    expected[order] = torch.arange(len(order), device=DEVICE)
    assert torch.equal(rows.of_slot.flatten().long(), expected)
    ends = torch.bincount(flat + 1, minlength=count + 1)[1:].cumsum(0)
    assert rows.offsets.tolist() == [0, *ends.tolist()]


def exact(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values that FP8 with their row's scale holds exactly, so that the interpreter's rounding does not matter."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (rows, columns), generator=rng).half()
    x[:, 0] = 448
    return (x * 2.0 ** -torch.randint(0, 5, (rows, 1), generator=rng)).half().to(DEVICE)


def test_tokens_are_scattered_to_their_rows():
    x, experts = exact(6, 100), torch.tensor([[0, 2], [2, -1], [-1, -1], [1, 0], [2, 1], [0, 1]], device=DEVICE)
    rows = sort_slots(experts, 3)
    codes, scales = scatter_quantized(x, rows)
    for slot, row in enumerate(rows.of_slot.flatten().tolist()):
        if row >= 0:
            assert torch.equal(codes[row].float() * scales[row], x[slot // 2].float())


@pytest.mark.gpu
def test_rounding_is_the_references():
    """Bit for bit, NaN and infinity included."""
    x = activations("outliers", 40, 1408, dtype=torch.bfloat16, device=DEVICE)
    x[3, 5], x[4, 0] = float("nan"), float("inf")
    codes, scales = scatter_quantized(x, sort_slots(torch.zeros(40, 1, dtype=torch.int64, device=DEVICE), 1))
    expected, expected_scales = quantize(x, TOKEN)
    torch.testing.assert_close(scales, expected_scales[:, 0], rtol=0, atol=0, equal_nan=True)
    good = scales.isfinite()
    assert torch.equal(codes.float()[good], expected.float()[good])


@pytest.mark.parametrize("columns", [48, 300])
def test_activation(columns):
    """Within what rounding to FP8 loses; rows beyond the last expert's are left alone."""
    x = torch.randn(9, 2 * columns, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    rows = Rows(of_slot=torch.empty(0), offsets=torch.tensor([0, 3, 7], dtype=torch.int32, device=DEVICE))
    codes, scales = silu_quantized(x, rows)
    expected = (torch.nn.functional.silu(x[:7, :columns].float()) * x[:7, columns:].float())
    torch.testing.assert_close(scales[:7], expected.abs().amax(1) / 448, rtol=1e-5, atol=0)
    # half a unit in the last place on a GPU; the interpreter truncates, and may lose the carry
    share = 2.0**-4 if DEVICE.type == "cuda" else 0.5
    error = (codes[:7].float() * scales[:7, None] - expected).abs()
    assert (error <= share * expected.abs() + scales[:7, None] * 2.0**-9).all()


def test_rows_are_added_up_by_token():
    rng = torch.Generator().manual_seed(0)
    experts = torch.randint(-1, 4, (7, 3), generator=rng).to(DEVICE)
    rows, weights = sort_slots(experts, 4), torch.rand(7, 3, generator=rng).to(DEVICE)
    y = torch.randn(21, 1500, generator=rng).to(DEVICE, torch.float16)
    y[int(rows.offsets[-1]):] = float("nan")  # never written
    at = rows.of_slot.long().clamp(min=0)
    expected = (y[at].float().nan_to_num(0) * (weights * (experts >= 0))[..., None]).sum(1)
    torch.testing.assert_close(add_rows(y, weights, rows), expected, rtol=1e-5, atol=1e-5)


def test_the_workspace_is_what_the_library_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr(grouped, "load_op", lambda op: lambda *args: asked.append((op, *args)) or 640)
    gemm = GroupedFp8(8, torch.device("cpu"))
    assert gemm.workspace.shape == (640,) and gemm.workspace.dtype == torch.uint8
    assert asked == [("grouped_fp8_workspace", 8, 1)]


@pytest.fixture
def library():
    if reason := cutlass_missing("grouped_fp8_gemm", torch.device("cuda")):
        pytest.skip(reason)


def experts_of(count: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(n * k)
    codes = (torch.randn(count, n, k, generator=rng) * 40).to(torch.float8_e4m3fn)
    return codes.cuda(), ((torch.rand(count, n, generator=rng) + 0.5) / 2000).cuda()


SIZES = {"nobody": [0] * 5, "one": [0, 0, 1, 0, 0], "few": [3, 0, 16, 17, 1], "first": [40, 0, 0, 0, 0],
         "many": [0, 300, 129, 0, 64]}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("n, k", [(8, 16), (200, 1408), (1032, 4096)])
@pytest.mark.parametrize("config", range(-1, CONFIGS))
def test_contract(library, sizes, n, k, config):
    """Experts without rows, rows without an expert: these keep what they held."""
    count, spare = len(sizes), 5
    weights, scales = experts_of(count, n, k)
    x = activations("normal", sum(sizes) + spare, k, dtype=torch.bfloat16, device="cuda")
    codes, x_scales = quantize(x, TOKEN)
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    gemm, out = GroupedFp8(count, x.device), torch.full((len(x), n), 7.0, dtype=torch.bfloat16, device="cuda")
    gemm.gemm(out, codes, weights, offsets, x_scales[:, 0].contiguous(), scales, gemm.workspace, config,
              gemm.multiprocessors)
    rounded, bounds = dequantize(codes, x_scales, TOKEN), offsets.tolist()
    for e in range(count):
        mine = slice(bounds[e], bounds[e + 1])
        dense = weights[e].float() * scales[e, :, None]
        check_product(out[mine], rounded[mine], dense, bound=BOUND).require(f"expert {e}")
    assert (out[bounds[-1]:] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", range(CONFIGS))
def test_a_captured_graph_follows_the_offsets(library, config):
    weights, scales = experts_of(4, 136, 256)
    codes, x_scales = quantize(torch.randn(90, 256, device="cuda").bfloat16(), TOKEN)
    x_scales, gemm = x_scales[:, 0].contiguous(), GroupedFp8(4, weights.device)
    rows = Rows(of_slot=torch.empty(0), offsets=torch.tensor([0, 90, 90, 90, 90], dtype=torch.int32, device="cuda"))
    gemm(codes, x_scales, weights, scales, rows, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm(codes, x_scales, weights, scales, rows, config)
    for offsets in ([0, 0, 0, 0, 90], [0, 20, 20, 77, 90], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]):
        rows.offsets.copy_(torch.tensor(offsets))
        graph.replay()
        assert torch.equal(out[: offsets[-1]], gemm(codes, x_scales, weights, scales, rows, config)[: offsets[-1]])


@pytest.mark.gpu
def test_a_workspace_too_small_is_refused(library):
    weights, scales = experts_of(2, 64, 64)
    codes, x_scales = quantize(torch.randn(4, 64, device="cuda").bfloat16(), TOKEN)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32, device="cuda")
    out = torch.empty(4, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="launcher code -3"):
        load_op("grouped_fp8_gemm")(out, codes, weights, offsets, x_scales[:, 0].contiguous(), scales,
                                    torch.empty(256, dtype=torch.uint8, device="cuda"), -1, 132)
