"""RMSNorm and gated SiLU in one launch, with the residual's sum before and the consumer's rounding behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import early, missing
from ..ops import optional_op
from ..quantize import GROUPS_AT_ONCE, Quantized, Rounding, code_settings, empty_codes
from ..scheme import Activation

# Values of one program of a SiLU whose output is not rounded: it need not see a whole row.
SILU_BLOCK = 1024
# What csrc/norm_rope/silu_mul_fp8.cu takes: clusters, and rows of whole vectors that the registers of one hold.
CLUSTERS, VECTOR, ALIGNMENT, WIDEST = (9, 0), 8, 16, 65536


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None,
                   rounding: Rounding | None = None, keep: bool = False) -> tuple[Tensor | Quantized, Tensor]:
    """`rms_norm` by Triton, any rows of contiguous values; with `rounding` what `quantize` makes of its result, and if
    `keep` that result, too.

    Returns:
        (normed, sum): normed is [..., D], or Quantized with codes [T, D]; the sum is x itself without a residual.
    """
    from .triton_norm import rms_norm_kernel

    width = x.shape[-1]
    rows = _rows(x)
    add = rows if residual is None else _rows(residual)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = _Tile.of(width, None if rounding is None else rounding.activation.group)
    out, scales = _outputs(rows, width, rounding)
    values = rows.new_empty(len(rows), width) if keep and rounding is not None else None
    if len(rows):
        rms_norm_kernel[(len(rows),)](
            rows, add, weight, total, out, scales, _static(rounding, scales), out if values is None else values, width,
            scales.shape[-1], rows.stride(0), add.stride(0), eps, HAS_RESIDUAL=residual is not None,
            QUANTIZE=rounding is not None, KEEP=values is not None, ROWS=shape.groups, BLOCK=shape.block,
            GROUP=shape.group, num_warps=_warps(shape.groups * shape.block),
            **early(x.device), **code_settings(None if rounding is None else rounding.activation))
    if rounding is None:
        return out.view(x.shape), total
    return Quantized(codes=out, scales=scales, dtype=x.dtype, values=values), total


def fused_silu_mul(x: Tensor, rounding: Rounding | None = None) -> Tensor | Quantized:
    """`silu_mul` of x [T, 2 D] in one launch; with `rounding` what `quantize` makes of its result."""
    from .triton_norm import silu_mul_kernel

    width, rows = x.shape[-1] // 2, _rows(x)
    out, scales = _outputs(rows, width, rounding)
    if rounding is not None and (compiled := _compiled(rounding.activation, width, rows)) is not None:
        compiled(out, scales, rows, rounding.static_scale)
        return Quantized(codes=out, scales=scales, dtype=x.dtype)
    if rounding is None:
        shape = _Tile(groups=1, block=min(SILU_BLOCK, _pow2(width)), group=min(SILU_BLOCK, _pow2(width)))
    else:
        shape = _Tile.of(width, rounding.activation.group)
        shape = shape._replace(groups=min(shape.groups, GROUPS_AT_ONCE))
    if len(rows):
        silu_mul_kernel[(len(rows), -(-width // (shape.groups * shape.group)))](
            rows, out, scales, _static(rounding, scales), width, scales.shape[-1], rows.stride(0),
            QUANTIZE=rounding is not None, ROWS=shape.groups, BLOCK=shape.block, GROUP=shape.group,
            num_warps=_warps(shape.groups * shape.block),
            **early(x.device), **code_settings(None if rounding is None else rounding.activation))
    if rounding is None:
        return out.view(*x.shape[:-1], width)
    return Quantized(codes=out, scales=scales, dtype=x.dtype)


def _compiled(activation: Activation, width: int, rows: Tensor) -> Callable[..., None] | None:
    """The kernel in which several multiprocessors share a row, where it can be had and takes these rows: Triton's gives
    a row that is rounded as a whole to one, 6 us at 14336 values on an H100."""
    if (activation.dtype != "fp8_e4m3" or activation.group is not None or rows.dtype == torch.float32
            or width % VECTOR or width > WIDEST or rows.stride(0) % VECTOR or rows.data_ptr() % ALIGNMENT
            or missing(rows.device, CLUSTERS)):
        return None
    return optional_op("silu_mul_fp8", rows.device)


class _Tile(NamedTuple):
    """A row as `groups` runs of `group` values, padded to `block`; both powers of two."""

    groups: int
    block: int
    group: int

    @classmethod
    def of(cls, width: int, group: int | None) -> _Tile:
        group = group or width
        return cls(groups=_pow2(-(-width // group)), block=_pow2(group), group=group)


def _outputs(rows: Tensor, width: int, rounding: Rounding | None) -> tuple[Tensor, Tensor]:
    """What a row is written to: values, or codes and their scales."""
    if rounding is None:
        out = rows.new_empty(len(rows), width)
        return out, out
    return empty_codes(len(rows), width, rounding.activation, rows.device)


def _static(rounding: Rounding | None, other: Tensor) -> Tensor:
    """The static scale, or any tensor where there is none."""
    return other if rounding is None or rounding.static_scale is None else rounding.static_scale


def _rows(x: Tensor) -> Tensor:
    """x as [T, D] whose rows are contiguous, copied only where they are not."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _warps(block: int) -> int:
    return min(32, max(1, block // 256))
