"""Triton: residual sum, RMSNorm and rounding to codes in one launch; gated SiLU and rounding in one."""

from __future__ import annotations

import triton
import triton.language as tl

from ..quantize.triton_kernel import to_codes
from ..triton_early import start_early


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, static_ptr, value_ptr, D, groups, x_row, residual_row,
    eps,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, KEEP: tl.constexpr,
    LARGEST: tl.constexpr, SCALE_MIN: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):
    """Program t: x + residual of row t to sum [T, D], its norm to out [T, D], or codes to out and scales [T, groups],
    with KEEP also the norm to value [T, D].

    The row is held as ROWS groups of BLOCK, of which GROUP count: a group that is rounded together lies in one. Every
    step is rounded to the dtype of x as the separate operations round, so that the codes are theirs.
    """
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    group, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + k[None, :]
    inside = (column < D) & (k < GROUP)[None, :]
    x = tl.load(x_ptr + t * x_row + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    value = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * residual_row + column, mask=inside, other=0.0)
        total = (value + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + t * D + column, total, mask=inside)
        value = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = ((value * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if QUANTIZE:
        codes, scales = to_codes(y.to(tl.float32), static_ptr, out_ptr.dtype.element_ty, LARGEST, SCALE_MIN, STATIC,
                                 INTEGER)
        tl.store(out_ptr + t * D + column, codes, mask=inside)
        tl.store(scale_ptr + t * groups + group, scales, mask=group < groups)
        if KEEP:
            tl.store(value_ptr + t * D + column, y, mask=inside)
    else:
        tl.store(out_ptr + t * D + column, y, mask=inside)


@triton.jit
def silu_mul_kernel(
    x_ptr, out_ptr, scale_ptr, static_ptr, D, groups, x_row,
    QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr, SCALE_MIN: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):
    """Program (t, i): silu(gate) * up of ROWS groups of GROUP values of row t of x [T, 2 D] = (gate, up) to out [T, D],
    or codes to out and scales [T, groups]; rounded to the dtype of x as the separate operations round."""
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    group, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + k[None, :]
    inside = (column < D) & (k < GROUP)[None, :]
    gate = tl.load(x_ptr + t * x_row + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + t * x_row + D + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = gate.dtype
    gate = gate.to(tl.float32)
    y = ((gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up).to(dtype)
    if QUANTIZE:
        codes, scales = to_codes(y.to(tl.float32), static_ptr, out_ptr.dtype.element_ty, LARGEST, SCALE_MIN, STATIC,
                                 INTEGER)
        tl.store(out_ptr + t * D + column, codes, mask=inside)
        tl.store(scale_ptr + t * groups + group, scales, mask=group < groups)
    else:
        tl.store(out_ptr + t * D + column, y, mask=inside)
