"""The door of the CUDA decode kernels: `paged_attention_v1`, `paged_attention_v2` and `reshape_and_cache`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import multiprocessors
from ..ops import load_op, op_missing

HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16)
# Fewest tokens of a sequence that one block of `paged_attention_v2` takes.
PARTITION = 512
# Query heads of one block.
ROWS = 16
# Blocks that a multiprocessor holds at once; with twice as many in all, the last ones to end waste little.
RESIDENT = 2
ALIGNMENT = 16


def paged_attention_missing(*, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int,
                            block_size: int) -> str | None:
    """Why the decode kernels cannot run for queries of `dtype` over such a cache; None when they can."""
    if dtype not in DTYPES:
        return f"computes in float16 and bfloat16, not in {dtype}"
    if cache_dtype not in (dtype, torch.float8_e4m3fn):
        return f"reads a cache of {dtype} or torch.float8_e4m3fn, not of {cache_dtype}"
    if head_dim not in HEAD_SIZES:
        return f"built for heads of {', '.join(map(str, HEAD_SIZES))}, not {head_dim}"
    if block_size not in BLOCK_SIZES:
        return f"built for blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block_size}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return op_missing("paged_attention_v1", device)


def reshape_and_cache_missing(*, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, kv_heads: int,
                              head_dim: int) -> str | None:
    """Why `reshape_and_cache` cannot write keys and values of `dtype` into such a cache; None when it can."""
    if dtype not in DTYPES:
        return f"writes float16 and bfloat16, not {dtype}"
    if cache_dtype not in (dtype, torch.float8_e4m3fn):
        return f"fills a cache of {dtype} or torch.float8_e4m3fn, not of {cache_dtype}"
    if kv_heads * head_dim % 8:
        return f"writes 8 values at a time, and a token has {kv_heads} x {head_dim}"
    return op_missing("reshape_and_cache", device)


class Workspace(NamedTuple):
    """What `paged_attention_v2` keeps of each partition of `tokens` tokens; content need not survive a call.

    All float32: its result [R, heads, parts, D], the highest score and the sum of exponentials [R, heads, parts].
    """

    partial: Tensor
    maxima: Tensor
    sums: Tensor
    tokens: int

    @classmethod
    def of(cls, requests: int, heads: int, head_dim: int, max_seq_len: int, device: torch.device,
           tokens: int = PARTITION) -> Workspace:
        """A workspace for sequences of up to `max_seq_len` tokens."""
        shape = requests, heads, -(-max_seq_len // tokens)
        partial, maxima, sums = (torch.empty(*shape, *width, dtype=torch.float32, device=device)
                                 for width in ((head_dim,), (), ()))
        return cls(partial, maxima, sums, tokens)


def partition_tokens(requests: int, heads: int, kv_heads: int, max_seq_len: int, device: torch.device) -> int | None:
    """Tokens of a partition, a multiple of `PARTITION`; None where whole sequences keep the device busy (`v1`).

    `max_seq_len` may be what a captured graph has room for: there are no more partitions than could be of use, since
    every one costs a block, in sight or not.
    """
    blocks, busy = requests * kv_heads * -(-heads // kv_heads // ROWS), RESIDENT * multiprocessors(device)
    if max_seq_len <= PARTITION or blocks >= 2 * busy:
        return None
    most = max(2, 8 * busy // blocks)
    return PARTITION * -(-max_seq_len // (PARTITION * most))


def paged_attention_v1(out: Tensor, q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, scale: float,
                       window: int | None = None, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Attention of one query per request over the paged cache, each sequence in one pass (arXiv 2309.06180).

    Args:
        out: [R, heads, D], dense, written. q: [R, heads, D] float16 or bfloat16, rows of any stride that is a multiple
            of 8, 16-byte aligned.
        cache: [2, num_blocks, block_size, kv_heads, D], dense, of q's dtype or float8_e4m3fn; kv_heads divides heads.
        block_table: [R, max_blocks] int32, rows valid up to ceil(seq_len / block_size).
        seq_lens: [R] int32, keys of each request, its query's own included. 0 is a padded row: zeros are written.
        scale: multiplies q k. window: positions in sight, the query's own included; None sees all.
        k_scale, v_scale: a cached value times its scale is the value.

    Sums are float32; probabilities are rounded to q's dtype before they meet the values. Only slots in sight are read.
    """
    load_op("paged_attention_v1")(out, _aligned(q), cache, block_table, seq_lens, scale, window or 0, k_scale, v_scale)


def paged_attention_v2(out: Tensor, workspace: Workspace, q: Tensor, cache: Tensor, block_table: Tensor,
                       seq_lens: Tensor, *, scale: float, window: int | None = None, k_scale: float = 1.0,
                       v_scale: float = 1.0) -> None:
    """As `paged_attention_v1`, in the workspace's partitions, which a second kernel merges (flash-decoding).

    `workspace` must have room for the longest of `seq_lens`.
    """
    load_op("paged_attention_v2")(out, *workspace[:3], _aligned(q), cache, block_table, seq_lens, scale, window or 0,
                                  k_scale, v_scale, workspace.tokens)


def reshape_and_cache(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, *, k_scale: float = 1.0,
                      v_scale: float = 1.0) -> None:
    """Store K and V of new tokens.

    Args:
        k, v: [T, kv_heads, D] float16 or bfloat16, rows of any stride that is a multiple of 8.
        cache: [2, num_blocks, block_size, kv_heads, D], dense; of their dtype, or float8_e4m3fn, which holds value /
            scale, held inside its range.
        slots: [T] int64, block * block_size + offset; a negative one is skipped.
    """
    load_op("reshape_and_cache")(_aligned(k), _aligned(v), cache, slots, k_scale, v_scale)


def _aligned(rows: Tensor) -> Tensor:
    """`rows`, copied if the kernels' 16-byte loads could not start at them."""
    dense = rows.stride(1) == rows.shape[2] and rows.stride(2) == 1
    regular = dense and rows.stride(0) % 8 == 0 and rows.data_ptr() % ALIGNMENT == 0
    return rows if regular else rows.clone(memory_format=torch.contiguous_format)
