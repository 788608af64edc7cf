"""Plain torch RMSNorm, rotary embedding and gated SiLU: right on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of `x + residual`, and that sum.

    Args:
        x: [..., D] in any float dtype. weight: [D]. residual: as x, or None for zero.
    Returns:
        (normed, sum), both shaped as x and in its dtype. The mean square is taken in float32.
    """
    if residual is not None:
        x = x + residual
    y = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), eps=eps)
    return y.to(x.dtype) * weight, x


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head (arXiv 2104.09864, the half-split form of Llama).

    Args:
        x: [T, heads, D]. cos, sin: [T, 1, D] with the second half repeating the first, sine negated in the first half.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return (x * cos).addcmul_(swapped, sin)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of x [T, 2 D] = (gate, up) -> [T, D]."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
