"""Rows of some experts: where they go and what is written, and, on a GPU, torch's grouped product by the contract."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.contract import Bound, activations, check_product
from nybble.csrc.moe_gemm import CodedStack
from nybble.csrc.moe_gemm.grouped import sort_slots
from nybble.csrc.moe_gemm.many_rows import Part, grouped_refusal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT, TOP_K, TOKENS = 6, 2, 15


@pytest.fixture(params=[(0, 6), (2, 5), (5, 6)], ids=str)
def part(request):
    experts = torch.randint(-1, COUNT, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return Part(experts=experts, rows=sort_slots(experts, COUNT), first=request.param[0], last=request.param[1])


def slots_of(part):
    """(slot, expert, row) of every slot of the part's experts, by sorting."""
    flat = part.experts.flatten().tolist()
    mine = sorted((e, slot) for slot, e in enumerate(flat) if part.first <= e < part.last)
    return [(slot, e, row) for row, (e, slot) in enumerate(mine)]


def orders(columns):
    rng = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(columns, generator=rng) for _ in range(COUNT)]).int().to(DEVICE)


@pytest.mark.parametrize("columns", [40, 5000])
@pytest.mark.parametrize("ordered", [False, True])
def test_tokens_go_to_their_rows(part, columns, ordered):
    x = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    order = orders(columns) if ordered else None
    rows = part.scatter(x, order)
    assert rows.shape == (TOKENS * TOP_K, columns)
    for slot, expert, row in slots_of(part):
        expected = x[slot // TOP_K] if order is None else x[slot // TOP_K, order[expert].long()]
        assert torch.equal(rows[row], expected)


@pytest.mark.parametrize("columns", [40, 5000])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_activation(part, columns, ordered):
    """Rounded once; rows of nobody keep what they held."""
    gate, up = torch.randn(2, TOKENS * TOP_K, columns, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    order, held = orders(columns) if ordered else None, gate.clone()
    dense = torch.nn.functional.silu(gate.double()) * up.double()
    out, mine = part.gated(gate, up, order), slots_of(part)
    for _, expert, row in mine:
        expected = dense[row] if order is None else dense[row, order[expert].long()]
        # half a unit in the last place, and what float32's exponential loses
        assert ((out[row].double() - expected).abs() <= 2.0**-11 * 1.01 * expected.abs() + 2.0**-25).all()
    assert torch.equal(gate[len(mine) :], held[len(mine) :])


def test_outputs_go_among_all_rows(part):
    y = torch.randn(TOKENS * TOP_K, 72, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    out = torch.full_like(y, 7)
    part.place(y, out)
    mine, first = len(slots_of(part)), int(part.rows.offsets[part.first])
    assert torch.equal(out[first : first + mine], y[:mine])
    assert (out[:first] == 7).all() and (out[first + mine :] == 7).all()


def test_plain_weights_are_given_as_they_lie():
    """Inputs are padded to whole blocks in memory; a product does not see that."""
    stack = CodedStack(3, None, None)
    weights = torch.randn(3, 24, 72, generator=torch.Generator().manual_seed(0)).half()
    for number, weight in enumerate(weights):
        stack.put_plain(number, weight)
    dense = stack.dense(1, 3, torch.empty(0))
    assert torch.equal(dense, weights[1:]) and dense.data_ptr() == stack.tensors["codes"][1].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(1408, 2048), (4096, 14336)])
@pytest.mark.parametrize("sizes", [[300, 0, 1, 129, 0, 770], [0] * 6, [0, 0, 0, 1200, 0, 0]])
@pytest.mark.parametrize("first, last", [(0, 6), (2, 5)])
def test_contract(n, k, sizes, first, last):
    """Experts without rows among them, and experts of other parts before and behind."""
    if reason := grouped_refusal(n, k, torch.bfloat16, DEVICE):
        pytest.skip(reason)
    experts = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))[:, None].to(DEVICE)
    experts = torch.cat([experts, torch.full((5, 1), -1, device=DEVICE)])
    part = Part(experts=experts, rows=sort_slots(experts, 6), first=first, last=last)
    weights = (torch.randn(6, n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5).to(DEVICE, torch.bfloat16)
    for kind in ("normal", "outliers"):
        x = activations(kind, len(experts), k, dtype=torch.bfloat16, device=DEVICE)
        out, row = part.product(part.scatter(x, None), weights[first:last]), 0
        for e in range(first, last):
            mine = slice(sum(sizes[:e]), sum(sizes[: e + 1]))
            check_product(out[row : row + sizes[e]], x[mine], weights[e], bound=Bound()).require(f"{kind}, expert {e}")
            row += sizes[e]
