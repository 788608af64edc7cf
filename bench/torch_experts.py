"""A layer of experts by torch's grouped products, sorting included: what ours are timed beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..csrc.quantize import quantize, triton_quantize
from ..csrc.scheme import Scheme
from .kernels import TOKEN


def torch_can(scheme: Scheme | None) -> bool:
    """Whether torch has grouped products for a format: 16 bits, and FP8 with one scale for each output."""
    return scheme is None or (scheme.code == "fp8_e4m3" and scheme.group is None and scheme.activation == TOKEN)


def torch_experts(tensors: Mapping[str, Tensor], scheme: Scheme | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x [T, H], weights [T, K], experts [T, K]) -> [T, H], of `grouped_mm` or `_scaled_grouped_mm`.

    Args:
        tensors: gate.codes and up.codes [E, I, H], down.codes [E, H, I]; for FP8 .scales of each, [E, rows, 1] float32.
    """
    gate, up, down = (tensors[f"{name}.codes"] for name in ("gate", "up", "down"))
    gate_up, count = torch.cat([gate.view(torch.uint8), up.view(torch.uint8)], dim=1).view(gate.dtype), len(gate)
    both, last = None, None
    if scheme is not None:
        both = torch.cat([tensors["gate.scales"], tensors["up.scales"]], dim=1).squeeze(-1)
        last = tensors["down.scales"].squeeze(-1)
    rounded = triton_quantize if gate.device.type == "cuda" else quantize

    def product(x: Tensor, w: Tensor, scale: Tensor | None, offsets: Tensor) -> Tensor:
        if scale is None:
            return torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=offsets)
        codes, x_scale = rounded(x, TOKEN)
        return torch._scaled_grouped_mm(codes, w.transpose(1, 2), x_scale.squeeze(-1), scale, offs=offsets,
                                        out_dtype=torch.bfloat16)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        slots = ids.flatten()
        order = slots.argsort(stable=True)
        sizes = torch.zeros(count, dtype=torch.int32, device=x.device).scatter_add_(
            0, slots, torch.ones_like(slots, dtype=torch.int32))
        offsets = sizes.cumsum(0, dtype=torch.int32)
        both_out = product(x[order // ids.shape[1]], gate_up, both, offsets)
        half = both_out.shape[1] // 2
        hidden = torch.nn.functional.silu(both_out[:, :half]) * both_out[:, half:]
        y = product(hidden, down, last, offsets)
        back = torch.empty_like(y).index_copy_(0, order, y)
        return (back.unflatten(0, ids.shape).float() * weights.unsqueeze(-1)).sum(1)

    return run
