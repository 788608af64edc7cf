"""Writing the paged cache by Triton: plain, or with the rotation (and norm) of queries and keys in the same launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import early
from ..norm_rope import rms_norm, rotary
from .reference import write_kv

# Values of one program: heads are taken together until they make up about this many.
BLOCK_VALUES = 1024


class HeadNorms(NamedTuple):
    """RMSNorm of each head's query and key before they are rotated (as in Qwen3): weights [D]."""

    query: Tensor
    key: Tensor
    eps: float


def store_kv(cache: Tensor, k: Tensor, v: Tensor | None, slots: Tensor, *, k_scale: float = 1.0,
             v_scale: float = 1.0) -> None:
    """Store what new tokens keep.

    Args:
        cache: [2, num_blocks, block_size, kv_heads, D], or one plane when v is None; float8_e4m3fn values are divided
            by their scale first and held inside its range. k, v: [T, kv_heads, D]. slots: [T] int64, a negative one is
            skipped.
    """
    from .triton_cache import store_kernel

    tokens, heads, width = k.shape
    if tokens == 0:
        return
    planes, value = cache.flatten(1, 2), k if v is None else v
    block, padded = _tile(heads, width)
    store_kernel[(tokens, -(-heads // block))](
        k, value, planes[0], planes[-1], slots, k.stride(0), k.stride(1), value.stride(0), value.stride(1),
        planes.stride(1), planes.stride(2), k_scale, v_scale,
        KV_HEADS=heads, D=width, D_PAD=padded, HAS_V=v is not None, FP8=_is_fp8(cache), BLOCK_H=block,
        **early(k.device))


def rope_and_cache(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, *, heads: int,
                   norms: HeadNorms | None = None, k_scale: float = 1.0, v_scale: float = 1.0) -> Tensor:
    """Rotate queries and keys by halves (arXiv 2104.09864), store keys and values, return the queries.

    Args:
        qkv: [T, (heads + 2 kv_heads) D], rows of any stride. cos, sin: [T, 1, D] as `norm_rope.rotary` takes them.
        cache, slots, k_scale, v_scale: as for `store_kv`. norms: taken of queries and keys first.
    Returns:
        q [T, heads, D]. One launch; arithmetic in float32, rounded once.
    """
    from .triton_cache import rope_cache_kernel

    kv_heads, width = cache.shape[3:]
    q = qkv.new_empty(len(qkv), heads, width)
    if len(qkv) == 0:
        return q
    planes = cache.flatten(1, 2)
    block, half = _tile(heads + 2 * kv_heads, width // 2)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    rope_cache_kernel[(len(qkv), -(-(heads + 2 * kv_heads) // block))](
        qkv, cos, sin, q_weight, k_weight, q, planes[0], planes[1], slots, qkv.stride(0), cos.stride(0),
        planes.stride(1), planes.stride(2), k_scale, v_scale, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=width, HALF_PAD=half, HAS_NORM=norms is not None, FP8=_is_fp8(cache),
        BLOCK_H=block, **early(qkv.device))
    return q


def rope_and_cache_reference(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, *, heads: int,
                             norms: HeadNorms | None = None, k_scale: float = 1.0, v_scale: float = 1.0) -> Tensor:
    """`rope_and_cache` in plain torch, step by step."""
    kv_heads, width = cache.shape[3:]
    q, k, v = qkv.unflatten(-1, (-1, width)).split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms.query, norms.eps)[0], rms_norm(k, norms.key, norms.eps)[0]
    kept = slots >= 0
    write_kv(cache, rotary(k, cos, sin)[kept], v[kept], slots[kept], k_scale=k_scale, v_scale=v_scale)
    return rotary(q, cos, sin)


def _tile(heads: int, width: int) -> tuple[int, int]:
    """(heads of one program, a head's width padded), both powers of two."""
    padded = 1 << (width - 1).bit_length()
    return min(max(1, BLOCK_VALUES // padded), 1 << (heads - 1).bit_length()), padded


def _is_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.float8_e4m3fn
