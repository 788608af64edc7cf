"""Triton: rotate queries and keys and store what is cached, in one launch; or store only."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _encode(x, scale, dtype: tl.constexpr, FP8: tl.constexpr):
    """x as it is cached: divided by its scale, held inside the range of FP8."""
    if FP8:
        x = x.to(tl.float32) / scale
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX), x)  # NaN stays NaN
    return x.to(dtype)


@triton.jit
def store_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    k_token, k_head, v_token, v_head, cache_slot, cache_head, k_scale, v_scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_V: tl.constexpr, FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, EARLY: tl.constexpr,
):
    """Store k, and v, [T, KV_HEADS, D] at slots [T]; a negative slot is skipped. Grid: (T, tiles of heads)."""
    start_early(EARLY)
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, D_PAD)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    inside = (h < KV_HEADS)[:, None] & (d < D)[None, :]
    to = slot * cache_slot + h[:, None] * cache_head + d[None, :]
    k = tl.load(k_ptr + token * k_token + h[:, None] * k_head + d[None, :], mask=inside, other=0.0)
    tl.store(k_cache_ptr + to, _encode(k, k_scale, k_cache_ptr.dtype.element_ty, FP8), mask=inside)
    if HAS_V:
        v = tl.load(v_ptr + token * v_token + h[:, None] * v_head + d[None, :], mask=inside, other=0.0)
        tl.store(v_cache_ptr + to, _encode(v, v_scale, v_cache_ptr.dtype.element_ty, FP8), mask=inside)


@triton.jit
def _normed(low, high, h, d, d_in, q_weight_ptr, k_weight_ptr, eps, dtype: tl.constexpr, HEADS: tl.constexpr,
            D: tl.constexpr):
    """RMSNorm of each head by the weights of queries or of keys, rounded as `norm_rope.rms_norm` rounds."""
    HALF: tl.constexpr = D // 2
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
    is_q = (h < HEADS)[:, None]
    q_in, k_in = is_q & d_in, (h >= HEADS)[:, None] & d_in
    low_w = tl.load(q_weight_ptr + d + h[:, None] * 0, mask=q_in, other=0.0).to(tl.float32)
    low_w += tl.load(k_weight_ptr + d + h[:, None] * 0, mask=k_in, other=0.0).to(tl.float32)
    high_w = tl.load(q_weight_ptr + HALF + d + h[:, None] * 0, mask=q_in, other=0.0).to(tl.float32)
    high_w += tl.load(k_weight_ptr + HALF + d + h[:, None] * 0, mask=k_in, other=0.0).to(tl.float32)
    low, high = (low * scale).to(dtype).to(tl.float32) * low_w, (high * scale).to(dtype).to(tl.float32) * high_w
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@triton.jit
def rope_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    qkv_token, cos_token, cache_slot, cache_head, k_scale, v_scale, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HAS_NORM: tl.constexpr,
    FP8: tl.constexpr, BLOCK_H: tl.constexpr, EARLY: tl.constexpr,
):
    """Rotate the queries and keys of qkv [T, HEADS + 2 KV_HEADS, D] by halves; queries to q_out, k and v to slots [T].

    Grid: (T, tiles of heads). A negative slot is skipped. HAS_NORM: queries and keys are normed first.
    """
    start_early(EARLY)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, HALF_PAD)[None, :]
    slot = tl.load(slot_ptr + token)
    d_in = d < HALF
    inside = (h < HEADS + 2 * KV_HEADS)[:, None] & d_in
    at = qkv_ptr + token * qkv_token + h[:, None] * D + d
    low_raw, high_raw = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
    if HAS_NORM:
        low, high = _normed(low, high, h, d, d_in, q_weight_ptr, k_weight_ptr, eps, low_raw.dtype, HEADS, D)
    cos = tl.load(cos_ptr + token * cos_token + d, mask=d_in, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * cos_token + HALF + d, mask=d_in, other=0.0).to(tl.float32)
    rotated_low, rotated_high = low * cos - high * sin, high * cos + low * sin

    to = q_out_ptr + (token * HEADS + h)[:, None] * D + d
    is_q = inside & (h < HEADS)[:, None]
    tl.store(to, rotated_low.to(q_out_ptr.dtype.element_ty), mask=is_q)
    tl.store(to + HALF, rotated_high.to(q_out_ptr.dtype.element_ty), mask=is_q)

    if slot < 0:
        return
    is_k = inside & ((h >= HEADS) & (h < HEADS + KV_HEADS))[:, None]
    to = k_cache_ptr + slot * cache_slot + (h - HEADS)[:, None] * cache_head + d
    # As two kernels would: rounded to the model's dtype before it is encoded.
    rotated_low, rotated_high = rotated_low.to(low_raw.dtype), rotated_high.to(low_raw.dtype)
    tl.store(to, _encode(rotated_low, k_scale, k_cache_ptr.dtype.element_ty, FP8), mask=is_k)
    tl.store(to + HALF, _encode(rotated_high, k_scale, k_cache_ptr.dtype.element_ty, FP8), mask=is_k)

    is_v = inside & (h >= HEADS + KV_HEADS)[:, None]
    to = v_cache_ptr + slot * cache_slot + (h - HEADS - KV_HEADS)[:, None] * cache_head + d
    tl.store(to, _encode(low_raw, v_scale, v_cache_ptr.dtype.element_ty, FP8), mask=is_v)
    tl.store(to + HALF, _encode(high_raw, v_scale, v_cache_ptr.dtype.element_ty, FP8), mask=is_v)
