"""Triton: inputs rounded to FP8 or int8 codes with a scale per token, group or tensor, exactly as the reference."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early


@triton.jit
def to_codes(
    x, static_ptr, dtype: tl.constexpr,
    LARGEST: tl.constexpr, SCALE_MIN: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr,
):
    """x [ROWS, BLOCK] float32, a group of values in each row -> codes of `dtype` [ROWS, BLOCK], scales [ROWS]."""
    size = tl.abs(x)
    if STATIC:
        scale = tl.load(static_ptr) + tl.zeros((x.shape[0],), tl.float32)
    else:
        scale = tl.maximum(tl.math.div_rn(tl.max(size, axis=1), LARGEST), SCALE_MIN)
    finite = tl.max((~(size < float("inf"))).to(tl.int32), axis=1) == 0
    values = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if INTEGER:
        # Adding 1.5 * 2^23 leaves no bits below one: the addition itself rounds half to even.
        values = tl.minimum(tl.maximum(values, -512.0), 512.0)
        values = (values + 12582912.0) - 12582912.0
        codes = tl.minimum(tl.maximum(values, -128.0), 127.0).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(values, -448.0), 448.0).to(dtype)
    return codes, tl.where(finite, scale, float("nan"))


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, static_ptr, K, groups,
    LARGEST: tl.constexpr, SCALE_MIN: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):
    """x [M, K] -> codes [M, K], scales [M, groups]. Program (m, i) takes ROWS groups of GROUP values of token m; GROUP
    is K where a token is one group, and BLOCK the power of two that holds it."""
    start_early(EARLY)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + k[None, :]
    inside = (column < K) & (k < GROUP)[None, :]
    x = tl.load(x_ptr + token * K + column, mask=inside, other=0.0).to(tl.float32)
    codes, scale = to_codes(x, static_ptr, codes_ptr.dtype.element_ty, LARGEST, SCALE_MIN, STATIC, INTEGER)
    tl.store(codes_ptr + token * K + column, codes, mask=inside)
    tl.store(scale_ptr + token * groups + group, scale, mask=group < groups)
