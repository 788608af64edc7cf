"""Triton: a decoding step's attention with what comes before it: rotation of queries and key, and the cache write."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early
from .triton_cache import _encode
from .triton_paged import _block, share_of


@triton.jit
def _rotated(at, cos_at, sin_at, weight_ptr, eps, inside, d, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads at `at` [R, 1], normed if HAS_NORM and rotated by halves, [R, D_PAD] in their dtype; d [1, D_PAD]. They are
    rounded as `rope_cache_kernel` rounds."""
    HALF: tl.constexpr = D // 2
    other = tl.where(d < HALF, d + HALF, d - HALF)
    x_raw, y_raw = tl.load(at + d, mask=inside, other=0.0), tl.load(at + other, mask=inside, other=0.0)
    dtype: tl.constexpr = x_raw.dtype
    x, y = x_raw.to(tl.float32), y_raw.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        w = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        w_other = tl.load(weight_ptr + other, mask=d < D, other=0.0).to(tl.float32)
        x = ((x * scale).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
        y = ((y * scale).to(dtype).to(tl.float32) * w_other).to(dtype).to(tl.float32)
    cos = tl.load(cos_at + d % HALF, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + HALF + d % HALF, mask=d < D, other=0.0).to(tl.float32)
    return (x * cos + tl.where(d < HALF, -y, y) * sin).to(dtype)


@triton.jit
def decode_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, k_ptr, v_ptr, slot_ptr, out_ptr, lse_ptr, seq_len_ptr,
    table_ptr, qkv_token, cos_token, cache_slot, cache_head, table_stride, qk_scale, k_scale, v_scale, eps,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_NORM: tl.constexpr, FP8: tl.constexpr, IN_PARTS: tl.constexpr, MIN_SHARE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):
    """`attention_kernel` of requests with one query each, of qkv [R, (GROUP KV_HEADS + 2 KV_HEADS) D] as it leaves its
    product. Grid: (R, KV_HEADS, splits), more than one IN_PARTS.

    The program whose keys are the last stores the new key and value at the request's slot. It does not read them back:
    the softmax starts with that key, as the cache would give it. A request with no keys writes nothing to the cache.
    """
    start_early(EARLY)
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, row = tl.load(seq_len_ptr + request), request.to(tl.int64)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)[None, :]
    head, m_in = kv_head * GROUP + m, m < GROUP
    splits = tl.num_programs(2)
    at = (row * (GROUP * KV_HEADS) + head) * splits + split

    first, last = 0, length
    if WINDOW > 0:
        first = tl.maximum(0, length - WINDOW) // BLOCK_N * BLOCK_N
    if IN_PARTS:
        first, last = share_of(split, first, last, splits, MIN_SHARE, BLOCK_N)
        if first >= last:
            tl.store(lse_ptr + at, tl.zeros((BLOCK_M,), tl.float32) - float("inf"), mask=m_in)
            return

    base, cos_at, sin_at = qkv_ptr + row * qkv_token, cos_ptr + row * cos_token, sin_ptr + row * cos_token
    q = _rotated(base + head[:, None] * D, cos_at, sin_at, q_weight_ptr, eps, m_in[:, None] & (d < D), d, D, HAS_NORM)
    one = tl.arange(0, 1)[:, None]
    k_at = base + (GROUP * KV_HEADS + kv_head + one) * D
    k = _rotated(k_at, cos_at, sin_at, k_weight_ptr, eps, d < D, d, D, HAS_NORM)
    v = tl.load(k_at + KV_HEADS * D + d, mask=d < D, other=0.0)
    k, v = _encode(k, k_scale, k_ptr.dtype.element_ty, FP8), _encode(v, v_scale, v_ptr.dtype.element_ty, FP8)

    k_ptr += kv_head.to(tl.int64) * cache_head
    v_ptr += kv_head.to(tl.int64) * cache_head
    newest = (last == length) & (length > 0)
    slot = tl.where(newest, tl.load(slot_ptr + request), -1) + one
    stored = (d < D) & (slot >= 0)
    tl.store(k_ptr + slot * cache_slot + d, k, mask=stored)
    tl.store(v_ptr + slot * cache_slot + d, v, mask=stored)

    k_seen, v_seen = k.to(q.dtype).to(tl.float32), v.to(q.dtype).to(tl.float32)
    top = tl.sum(q.to(tl.float32) * k_seen, 1) * qk_scale
    top = tl.where(newest, top, float("-inf"))
    total = tl.where(newest, 1.0, 0.0) + tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.where(newest, v_seen, 0.0) + tl.zeros((BLOCK_M, D_PAD), tl.float32)
    if UPCAST:
        q = q.to(tl.float32)
    table_at = table_ptr + row * table_stride
    # What is left is what the key before the newest would see, through a window that is one shorter.
    position, none, stop = length - 2 + m * 0, tl.zeros((1,), tl.int64), tl.minimum(last, length - 1)
    if WINDOW == 1:
        stop = first
    for start in range(first, stop, BLOCK_N):
        top, total, acc = _block(
            start, stop, position, q, q, top, total, acc, k_ptr, k_ptr, v_ptr, table_at, none, cache_slot, cache_slot,
            cache_slot, qk_scale, D, 0, D, D_PAD, D_PAD, D_PAD, PAGE, WINDOW - 1 if WINDOW > 0 else 0, True, BLOCK_N)

    out = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]  # a padded row has seen nothing: zeros
    tl.store(out_ptr + at[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=m_in[:, None] & (d < D))
    if IN_PARTS:
        tl.store(lse_ptr + at, top + tl.log2(total), mask=m_in)
