"""The compiled CPU kernels of paged attention: what they can run, new tokens into the cache, attention over it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import load_op, op_missing, optional_op
from .cache import HeadNorms
from .paged import Ragged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Query heads of one KV head that a tile holds.
MAX_GROUP = 64


def cpu_attention_missing(*, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int,
                          group: int) -> str | None:
    """Why the kernels cannot run such attention; None when they can. Builds them if need be.

    Args:
        group: query heads of one KV head.
    """
    if (reason := op_missing("cpu_attention", device)) is not None:
        return reason
    if dtype not in DTYPES:
        return f"computes in 16 or 32 bits, not in {_name(dtype)}"
    if cache_dtype != dtype:
        return f"reads a cache of the model's {_name(dtype)}, not of {_name(cache_dtype)}"
    if head_dim % 2:
        return f"head_dim {head_dim} has no halves to rotate"
    if group > MAX_GROUP:
        return f"{group} query heads of one KV head > {MAX_GROUP}"
    if optional_op("cpu_attention", device) is None:
        return "its library did not build or load: see the warning"
    return None


def store_kv_cpu(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store K and V of new tokens.

    Args:
        cache: [2, num_blocks, block_size, kv_heads, D]. k, v: [T, kv_heads, D] of its dtype. slots: [T] int64, a
            negative one is skipped.
    """
    load_op("cpu_store_kv")(_rows(k), _rows(v), cache, slots)


def rope_and_cache_cpu(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, *, heads: int,
                       norms: HeadNorms | None = None) -> Tensor:
    """`rope_and_cache` in one pass on the CPU: arithmetic in float32, rounded once.

    Args:
        qkv: [T, (heads + 2 kv_heads) D]. cos, sin: [T, 1, D] as `norm_rope.rotary` takes them. cache, slots: as for
            `store_kv_cpu`. norms: taken of queries and keys first.
    Returns:
        q [T, heads, D].
    """
    q = qkv.new_empty(len(qkv), heads, cache.shape[4])
    query, key, eps = norms or (None, None, 0.0)
    load_op("cpu_rope_and_cache")(q, _rows(qkv), cos, sin, cache, slots, query, key, eps)
    return q


def attend_paged_cpu(q: Tensor, cache: Tensor, batch: Ragged, *, scale: float, window: int | None = None) -> Tensor:
    """Causal attention over the paged cache; whatever q's rows attend to is already stored.

    A row's result depends on its own keys alone, to the last bit: not on the number of threads, on other requests, or
    on how many tokens its request computes in this step.

    Args:
        q: [T, heads, D] of the cache's dtype. cache: [2, num_blocks, block_size, kv_heads, D]. window: a query sees
            that many keys, itself included.
    Returns:
        [T, heads, D].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    load_op("cpu_attention")(out, _rows(q), cache, batch.query_start, batch.seq_lens, batch.block_table, scale,
                             window or 0)
    return out


def _rows(x: Tensor) -> Tensor:
    """x with dense rows, copied only where they are not."""
    dense = x.stride(-1) == 1 and (x.ndim == 2 or x.stride(-2) == x.shape[-1])
    return x if dense else x.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
