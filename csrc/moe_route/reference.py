"""Which experts a token goes to, and with what weight: softmax, grouped and sigmoid routing, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Keeps a sum of sigmoid scores that are all zero from dividing by it (DeepSeek-V3's own constant).
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How logits become a choice of experts.

    Attributes:
        top_k: experts of each token.
        score: softmax over all experts, or a sigmoid of each.
        renormalize: the chosen weights of a token are divided by their sum.
        scale: then multiplied by this.
        groups, top_groups: experts are `groups` runs of equal size, and only the best `top_groups` may be chosen from.
        group_score: a group is as good as its best expert (DeepSeek-V2), or as the sum of its best two (V3).
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> weights [T, top_k] float32 and experts [T, top_k] int64, best first.

    Of equal scores the lowest index is taken. `bias` [E] is added to the scores for the choice alone, not to weights
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; groups: arXiv 2405.04434, section 2.1.2).
    """
    logits = logits.float()
    scores = logits.softmax(dim=-1) if routing.score == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if routing.groups > routing.top_groups:
        members = choice.unflatten(-1, (routing.groups, -1))
        if routing.group_score == "max":
            worth = members.amax(dim=-1)
        else:
            worth = members.topk(min(2, members.shape[-1]), dim=-1).values.sum(dim=-1)
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _best(worth, routing.top_groups), True)
        choice = members.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = _best(choice, routing.top_k)
    weights = scores.gather(1, experts)
    if routing.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * routing.scale, experts


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, the lowest of equals first; `topk` promises no order."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
