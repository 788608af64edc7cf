"""The router's two launches choose the experts that plain torch chooses, equals and NaN included."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.moe_route import Routing, choose_experts, combine, fused_route, route, router_logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, INF = float("nan"), float("inf")
ROUTINGS = {
    "mixtral": (8, Routing(top_k=2, renormalize=True)),
    "v2-lite": (64, Routing(top_k=6)),
    "qwen": (60, Routing(top_k=4)),
    "v2": (24, Routing(top_k=3, scale=16.0, groups=8, top_groups=3)),
    "v3": (32, Routing(top_k=4, score="sigmoid", renormalize=True, scale=2.5, groups=8, top_groups=4,
                       group_score="top2")),
    "groups of 3": (18, Routing(top_k=5, score="sigmoid", groups=6, top_groups=2, group_score="top2")),
    "groups of 1": (5, Routing(top_k=2, score="sigmoid", groups=5, top_groups=2, group_score="top2")),
    "all groups": (12, Routing(top_k=12, groups=3, top_groups=3)),
}


def rows(experts: int, special: bool) -> torch.Tensor:
    """Logits of few levels, so that equals abound; `special` ones hold what is no number."""
    rng = torch.Generator().manual_seed(experts)
    levels = torch.tensor([-3.0, -1.0, 0.0, -0.0, 0.25, 2.0, *([NAN, INF, -INF] if special else [])])
    few = levels[torch.randint(len(levels), (12, experts), generator=rng)]
    few[0], few[1] = 0.3, -INF if special else 1.0
    return torch.cat((few, torch.randn(3, experts, generator=rng) * 3)).to(DEVICE)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("special", [False, True], ids=["", "special"])
def test_the_choice_is_the_references(name, biased, special):
    experts, routing = ROUTINGS[name]
    logits = rows(experts, special)
    bias = rows(experts, special)[3] / 4 if biased else None
    weights, chosen = fused_route(logits[None], routing, bias)
    expected_weights, expected = route(logits, routing, bias)
    assert chosen.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["mixtral", "v3", "all groups"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("special", [False, True], ids=["", "special"])
def test_inputs_and_choice(name, biased, special):
    """With one input for each expert, inputs are logits. NaN times 0 is NaN: special ones come to whole tokens."""
    experts, routing = ROUTINGS[name]
    x, bias = rows(experts, False), rows(experts, special)[3] / 4 if biased else None
    if special:
        x[3, 0], x[5, 1], x[7, 2] = NAN, INF, -INF
    eye = torch.eye(experts, device=DEVICE)
    weights, chosen = choose_experts(x, eye, routing, bias)
    expected_weights, expected = route(x @ eye, routing, bias)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-30, equal_nan=True)


def test_no_tokens():
    weights, chosen = fused_route(router_logits(torch.empty(0, 8, device=DEVICE), torch.empty(4, 8, device=DEVICE)),
                                  Routing(top_k=2))
    assert weights.shape == chosen.shape == (0, 2)


@pytest.mark.parametrize("tokens, experts, hidden", [(1, 8, 256), (3, 60, 1300), (70, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32,
                                   pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["fp16", "fp32", "bf16"])
def test_logits_are_float32s(tokens, experts, hidden, dtype):
    rng = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(size, hidden, generator=rng).to(DEVICE, dtype) for size in (tokens, experts))
    found = router_logits(x, weight)
    assert found.dtype == torch.float32 and found.shape == (-(-hidden // 512), tokens, experts)
    torch.testing.assert_close(found.double().sum(0), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_what_lies_beside_is_added_to_the_rounded_sum(dtype):
    rng = torch.Generator().manual_seed(0)
    y, beside = (torch.randn(rows, 70, generator=rng).to(DEVICE, dtype) for rows in (12, 4))
    weights, experts = torch.rand(4, 3, generator=rng).to(DEVICE), torch.randint(-1, 5, (4, 3), device=DEVICE)
    total = combine(y, weights, experts)
    assert total.dtype == torch.float32
    assert torch.equal(combine(y, weights, experts, dtype=dtype), total.to(dtype))
    assert torch.equal(combine(y, weights, experts, dtype=dtype, beside=beside), total.to(dtype) + beside)
