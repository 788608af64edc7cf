"""Rounding a layer's input to 8-bit codes: one function per op, whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import early
from ..scheme import Activation
from .reference import FP8_MAX, INT8_MAX, SCALE_MIN, dequantize, fake_quantize, quantize

__all__ = ["Quantized", "Rounding", "code_settings", "dequantize", "empty_codes", "fake_quantize", "quantize",
           "triton_quantize"]

# Groups one program takes, so that it has a few thousand bytes to load.
GROUPS_AT_ONCE = 8


class Rounding(NamedTuple):
    """How a product wants its input rounded, when it takes one that already is; the scale is a static activation's."""

    activation: Activation
    static_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """An input [T, K] that was rounded where it was made: codes [T, K] and float32 scales [T, G] as `quantize` gives
    them; `dtype` is that of the values, and of the product. `values` [T, K] are the input before it was rounded, where
    somebody takes it so."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    values: Tensor | None = None


def empty_codes(tokens: int, columns: int, activation: Activation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes [tokens, columns] and scales [tokens, groups], not written."""
    dtype = torch.int8 if activation.dtype == "int8" else torch.float8_e4m3fn
    groups = -(-columns // (activation.group or columns))
    return (torch.empty(tokens, columns, dtype=dtype, device=device),
            torch.empty(tokens, groups, dtype=torch.float32, device=device))


def code_settings(activation: Activation | None) -> dict[str, float | bool]:
    """What `triton_kernel.to_codes` must know at compile time; for None anything will do."""
    integer = activation is not None and activation.dtype == "int8"
    return {"LARGEST": INT8_MAX if integer else FP8_MAX, "SCALE_MIN": SCALE_MIN, "INTEGER": integer,
            "STATIC": activation is not None and activation.static}


def triton_quantize(x: Tensor, activation: Activation, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `quantize` gives for x [M, K], bit for bit, in one launch."""
    from .triton_kernel import quantize_kernel

    tokens, columns = x.shape
    group = activation.group or columns
    codes, scales = empty_codes(tokens, columns, activation, x.device)
    groups, block = scales.shape[1], 1 << (group - 1).bit_length()
    rows = 1 if groups == 1 else GROUPS_AT_ONCE
    if tokens:
        quantize_kernel[(tokens, -(-groups // rows))](
            x, codes, scales, scales if static_scale is None else static_scale, columns, groups,
            ROWS=rows, BLOCK=block, GROUP=group, num_warps=min(8, max(1, rows * block // 512)),
            **code_settings(activation), **early(x.device),
        )
    return codes, scales
