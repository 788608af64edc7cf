"""Routing against a loop over tokens in float64, and against transformers' own routers."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from nybble.csrc.moe_route import Routing, route
from nybble.moe import Router
from nybble.plugins.errors import CheckpointError

# Few levels, so that ties abound; where they differ, float32 and float64 agree on which is more.
LEVELS = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0])


def one_token(logits: list[float], routing: Routing, bias: list[float] | None) -> tuple[list[int], list[float]]:
    """A token's experts and their weights, said as plainly as can be; Python's sort keeps the order of equals."""
    if routing.score == "softmax":
        total = math.fsum(math.exp(value) for value in logits)
        scores = [math.exp(value) / total for value in logits]
    else:
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    choice = [score + extra for score, extra in zip(scores, bias or [0.0] * len(scores))]
    allowed = range(len(logits))
    if routing.top_groups < routing.groups:
        size = len(logits) // routing.groups
        groups = [list(range(start, start + size)) for start in range(0, len(logits), size)]
        count = {"max": 1, "top2": 2}[routing.group_score]
        best = [sorted((choice[e] for e in group), reverse=True)[:count] for group in groups]
        worth = [sum(values) for values in best]
        for a, b in combinations(range(len(groups)), 2):
            assume(best[a] == best[b] or abs(worth[a] - worth[b]) > 1e-5)  # equal sums of other values are rounding's
        chosen = sorted(range(routing.groups), key=lambda g: -worth[g])[: routing.top_groups]
        allowed = [e for g in sorted(chosen) for e in groups[g]]
    experts = sorted(allowed, key=lambda e: -choice[e])[: routing.top_k]
    divisor = sum(scores[e] for e in experts) if routing.renormalize else 1.0
    return experts, [scores[e] / divisor * routing.scale for e in experts]


@st.composite
def problems(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, groups))
    routing = Routing(
        top_k=draw(st.integers(1, size * top_groups)), score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()), scale=draw(st.sampled_from([1.0, 2.5])), groups=groups, top_groups=top_groups,
        group_score=draw(st.sampled_from(["max", "top2"])))
    rows = st.lists(LEVELS, min_size=groups * size, max_size=groups * size)
    return draw(st.lists(rows, min_size=1, max_size=4)), routing, draw(st.none() | rows)


@given(problems())
def test_route(problem):
    logits, routing, bias = problem
    weights, experts = route(torch.tensor(logits), routing, None if bias is None else torch.tensor(bias))
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    for row, own_weights, own_experts in zip(logits, weights, experts):
        expected, expected_weights = one_token(row, routing, bias)
        assert own_experts.tolist() == expected
        torch.testing.assert_close(own_weights.double(), torch.tensor(expected_weights, dtype=torch.float64),
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing, expected", [
    (Routing(top_k=3), [0, 1, 2]),
    (Routing(top_k=3, groups=4, top_groups=2), [0, 1, 2]),
    (Routing(top_k=3, groups=4, top_groups=2, group_score="top2", score="sigmoid"), [0, 1, 2]),
], ids=["all", "groups by max", "groups by top2"])
def test_of_equals_the_first_are_taken(routing, expected):
    weights, experts = route(torch.full((1000, 8), 0.3), routing)
    assert (experts == torch.tensor(expected)).all() and (weights == weights[0, 0]).all()


def test_no_tokens():
    weights, experts = route(torch.empty(0, 8), Routing(top_k=2, groups=4, top_groups=2))
    assert weights.shape == experts.shape == (0, 2)


def by_expert(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(experts), 16).scatter_(1, experts, weights)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    config = transformers.DeepseekV2Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, topk_method=method,
        routed_scaling_factor=2.5)
    theirs = DeepseekV2TopkRouter(config)
    grouped = {"groups": 4, "top_groups": 2} if method == "group_limited_greedy" else {}
    compare(theirs, Routing(top_k=4, scale=2.5, **grouped))


@pytest.mark.parametrize("renormalize", [False, True])
def test_deepseek_v3(renormalize):
    config = transformers.DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        norm_topk_prob=renormalize, routed_scaling_factor=2.5)
    theirs = DeepseekV3TopkRouter(config)
    theirs.e_score_correction_bias.normal_(0, 0.2)
    compare(theirs, Routing(top_k=4, score="sigmoid", renormalize=renormalize, scale=2.5, groups=4, top_groups=2,
                            group_score="top2"), bias="e_score_correction_bias")


def compare(theirs: torch.nn.Module, routing: Routing, bias: str | None = None) -> None:
    torch.manual_seed(0)
    torch.nn.init.normal_(theirs.weight, 0, 0.3)
    ours = Router("gate", 32, 16, routing, bias=bias, dtype=torch.float32, device=torch.device("cpu"))
    for slot in ours.slots():
        slot.put(0, getattr(theirs, slot.name.removeprefix("gate.")).detach())
    x = torch.randn(200, 32)
    with torch.inference_mode():
        _, weights, experts = theirs(x)
    torch.testing.assert_close(by_expert(*ours(x)), by_expert(weights, experts))


@pytest.mark.parametrize("routing, says", [
    (Routing(top_k=9), "9 of 8 experts"),
    (Routing(top_k=5, groups=4, top_groups=2), "5 of 8 experts"),
    (Routing(top_k=2, groups=3, top_groups=2), "2 of 8 experts"),
], ids=["too few", "too few in the groups", "uneven groups"])
def test_experts_that_are_not_there(routing, says):
    with pytest.raises(CheckpointError, match=says):
        Router("gate", 32, 8, routing, dtype=torch.float32, device=torch.device("cpu"))
