"""Triton: norm and round a latent, rotate its key and all queries, and store what is cached, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ..quantize.triton_kernel import to_codes
from ..triton_early import start_early
from .triton_cache import _encode


@triton.jit
def _rotated(at, cos_at, sin_at, mask, d_in, d, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The halves of rows at `at`, rotated, in their dtype; d [1, HALF_PAD]."""
    HALF: tl.constexpr = R // 2
    if INTERLEAVED:
        low, high = tl.load(at + 2 * d, mask=mask, other=0.0), tl.load(at + 2 * d + 1, mask=mask, other=0.0)
    else:
        low, high = tl.load(at + d, mask=mask, other=0.0), tl.load(at + HALF + d, mask=mask, other=0.0)
    dtype: tl.constexpr = low.dtype
    cos = tl.load(cos_at + d, mask=d_in, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + HALF + d, mask=d_in, other=0.0).to(tl.float32)
    low, high = low.to(tl.float32), high.to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def latent_cache_kernel(
    q_ptr, latent_ptr, k_pe_ptr, cos_ptr, sin_ptr, weight_ptr, static_ptr, q_pe_ptr, cache_ptr, slot_ptr,
    q_row, latent_row, k_pe_row, cos_row, cache_slot, eps, kv_scale,
    HEADS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, INTERLEAVED: tl.constexpr,
    QUANTIZE: tl.constexpr, FP8: tl.constexpr, FINITE: tl.constexpr,
    LARGEST: tl.constexpr, SCALE_MIN: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HALF_PAD: tl.constexpr, BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (t, 0) stores token t's normed latent [C] and rotated key [R] at its slot; program (t, i) rotates the
    last R of N + R values of BLOCK_H heads of q to q_pe [T, HEADS, R]. The latent is held as in `rms_norm_kernel`."""
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF_PAD)[None, :]
    d_in = d < R // 2
    cos_at, sin_at = cos_ptr + t * cos_row, sin_ptr + t * cos_row
    if tl.program_id(1) > 0:
        h = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inside = (h < HEADS) & d_in
        low, high = _rotated(q_ptr + t * q_row + h * (N + R) + N, cos_at, sin_at, inside, d_in, d, R, INTERLEAVED)
        to = q_pe_ptr + (t * HEADS + h) * R + d
        tl.store(to, low, mask=inside)
        tl.store(to + R // 2, high, mask=inside)
        return
    slot = tl.load(slot_ptr + t)
    if slot < 0:
        return
    row = cache_ptr + slot * cache_slot
    kind: tl.constexpr = cache_ptr.dtype.element_ty
    low, high = _rotated(k_pe_ptr + t * k_pe_row, cos_at, sin_at, d_in, d_in, d, R, INTERLEAVED)
    tl.store(row + C + d, _encode(low, kv_scale, kind, FP8), mask=d_in)
    tl.store(row + C + R // 2 + d, _encode(high, kv_scale, kind, FP8), mask=d_in)

    group, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + k[None, :]
    inside = (column < C) & (k < GROUP)[None, :]
    x = tl.load(latent_ptr + t * latent_row + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    value = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / C + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = ((value * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if QUANTIZE:
        codes, scales = to_codes(y.to(tl.float32), static_ptr, tl.int8 if INTEGER else tl.float8e4nv, LARGEST,
                                 SCALE_MIN, STATIC, INTEGER)
        back = codes.to(tl.float32) * scales[:, None]
        held = tl.minimum(tl.maximum(back, -FINITE), FINITE)
        y = tl.where(back == back, held, back).to(dtype)  # NaN stays NaN
    tl.store(row + column, _encode(y, kv_scale, kind, FP8), mask=inside)
