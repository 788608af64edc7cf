"""A router in two launches: logits in float32, then scores, choice and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import early
from .reference import TINY, Routing

# Tokens up to which few programs are wanted small, and the tiles (tokens, experts) below and above.
FEW_TOKENS = 64
BLOCK_FEW, BLOCK_MANY, BLOCK_HIDDEN = (16, 16), (64, 64), 128
# Inputs of one program: with all of them one multiprocessor read a whole router, 12 us at 8 x 4096 on an H100.
PER_SPLIT = 512


def choose_experts(x: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`route` of x [T, H] weight [E, H]^T in float32, in two launches."""
    return fused_route(router_logits(x, weight), routing, bias)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H], weight [E, H] of one dtype -> [splits, T, E] float32 whose sum is their product."""
    from .triton_route import logits_kernel

    x, (tokens, hidden), experts = x.contiguous(), x.shape, len(weight)
    splits = -(-hidden // PER_SPLIT)
    out = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    block_t, block_e = BLOCK_FEW if tokens <= FEW_TOKENS else BLOCK_MANY
    if tokens:
        logits_kernel[(-(-tokens // block_t), -(-experts // block_e), splits)](
            x, weight, out, tokens, experts, hidden, x.stride(0), PER_SPLIT=PER_SPLIT, UPCAST=x.device.type == "cpu",
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_H=BLOCK_HIDDEN, num_warps=4,
            num_stages=_stages(x), **early(x.device))
    return out


def fused_route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`route` of the sum of float32 logits [splits, T, E] in one launch: the same experts in the same order, NaN and
    equals included."""
    from .triton_route import route_kernel

    (splits, tokens, experts), logits = logits.shape, logits.contiguous()
    weights, chosen = _empty(tokens, routing, logits.device)
    groups = routing.groups if routing.top_groups < routing.groups else 1
    if tokens:
        route_kernel[(tokens,)](
            logits, logits if bias is None else bias, weights, chosen, tokens, routing.scale, SPLITS=splits, E=experts,
            GROUPS=groups, TOP_GROUPS=min(routing.top_groups, groups), TOP2=routing.group_score == "top2",
            G_PAD=_pow2(groups), S_PAD=_pow2(experts // groups), num_warps=1, **_settings(routing, bias),
            **early(logits.device))
    return weights, chosen


def _empty(tokens: int, routing: Routing, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (tokens, routing.top_k)
    return (torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int64, device=device))


def _settings(routing: Routing, bias: Tensor | None) -> dict[str, float | bool]:
    return {"TOP_K": routing.top_k, "SOFTMAX": routing.score == "softmax", "RENORMALIZE": routing.renormalize,
            "HAS_BIAS": bias is not None, "TINY": TINY, "K_PAD": _pow2(routing.top_k)}


def _stages(x: Tensor) -> int:
    """Few enough for the shared memory of a consumer's device."""
    return 4 if x.element_size() == 2 else 2


def _pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()
