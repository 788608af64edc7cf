"""RMSNorm and gated SiLU by the compiled CPU kernels, each one pass over its input, and who gets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import load_op, optional_op
from .reference import rms_norm, silu_mul


def rms_norm_for(device: torch.device) -> Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]:
    """`rms_norm` as a device runs it best without Triton; on CPU the kernel may be compiled for it now."""
    return rms_norm if optional_op("cpu_rms_norm", device) is None else rms_norm_cpu


def silu_mul_for(device: torch.device) -> Callable[[Tensor], Tensor]:
    """`silu_mul` likewise."""
    return silu_mul if optional_op("cpu_silu_mul", device) is None else silu_mul_cpu


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x [..., D] of 16 or 32 bits, arithmetic in float32, rounded where `rms_norm` rounds."""
    rows = _rows(x)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if residual is None:
        load_op("cpu_rms_norm")(out, None, rows, None, weight, eps)
        return out.view(x.shape), x
    total = torch.empty_like(out)
    load_op("cpu_rms_norm")(out, total, rows, _rows(residual), weight, eps)
    return out.view(x.shape), total.view(x.shape)


def silu_mul_cpu(x: Tensor) -> Tensor:
    """`silu_mul` of x [..., 2 D] of 16 or 32 bits, arithmetic in float32, rounded once -> [..., D]."""
    rows, width = _rows(x), x.shape[-1] // 2
    out = rows.new_empty(len(rows), width)
    load_op("cpu_silu_mul")(out, rows)
    return out.view(*x.shape[:-1], width)


def _rows(x: Tensor) -> Tensor:
    """x as [T, D] whose rows are dense, copied only where they are not."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
