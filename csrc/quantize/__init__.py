"""Rounding a layer's input to 8-bit codes: one function per op, whatever runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Activation
from .reference import FP8_MAX, INT8_MAX, SCALE_MIN, dequantize, fake_quantize, quantize

__all__ = ["dequantize", "fake_quantize", "quantize", "triton_quantize"]

# Groups one program takes, so that it has a few thousand bytes to load.
GROUPS_AT_ONCE = 8


def triton_quantize(x: Tensor, activation: Activation, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `quantize` gives for x [M, K], bit for bit, in one launch."""
    from .triton_kernel import quantize_kernel

    tokens, columns = x.shape
    group = activation.group or columns
    groups = -(-columns // group)
    integer = activation.dtype == "int8"
    codes = torch.empty_like(x, dtype=torch.int8 if integer else torch.float8_e4m3fn)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    block = 1 << (group - 1).bit_length()
    rows = 1 if groups == 1 else GROUPS_AT_ONCE
    if tokens:
        quantize_kernel[(tokens, -(-groups // rows))](
            x, codes, scales, scales if static_scale is None else static_scale, columns, groups,
            LARGEST=INT8_MAX if integer else FP8_MAX, SCALE_MIN=SCALE_MIN, STATIC=activation.static, INTEGER=integer,
            ROWS=rows, BLOCK=block, GROUP=group, num_warps=min(8, max(1, rows * block // 512)),
        )
    return codes, scales
