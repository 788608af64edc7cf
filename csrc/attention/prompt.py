"""The compiled kernel for attention of prompts on Hopper: what it takes, and the op where it is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from ..ops import op_missing, optional_op

DTYPES = (torch.float16, torch.bfloat16)
HEAD_SIZES, BLOCK_SIZES = (64, 128), (8, 16, 32, 64, 128)
# Rows of one program, which are queries x heads of a group.
ROWS = 128
HOPPER = 9
ALIGNMENT = 16  # bytes


@once
def prompt_attention_missing(*, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int,
                             block_size: int, group: int, window: int | None) -> str | None:
    """Why the kernel cannot run for queries of `dtype` over such a cache, `group` heads to one of its; None if it can.
    """
    if dtype not in DTYPES:
        return f"computes in float16 and bfloat16, not in {dtype}"
    if cache_dtype != dtype:
        return f"reads a cache of {dtype}, not of {cache_dtype}"
    if head_dim not in HEAD_SIZES or block_size not in BLOCK_SIZES or group > ROWS:
        return (f"built for heads of {' or '.join(map(str, HEAD_SIZES))}, up to {ROWS} to one of the cache, and blocks "
                f"of {', '.join(map(str, BLOCK_SIZES))} tokens: not {head_dim}, {group} and {block_size}")
    if window is not None:
        return "has no window"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "multiplies by Hopper's tensor cores"
    return None if (reason := op_missing("prompt_attention", device)) is None else f"cannot be had: {reason}"


def prompt_attention_op(q: Tensor, cache: Tensor, window: int | None) -> Callable[..., None] | None:
    """`prompt_attention(out, counter, q, cache, query_start, seq_lens, block_table, scale, v_scale)`, q [T, heads, D],
    cache [2, num_blocks, block_size, kv_heads, D], counter one int32 0; None where something else must do."""
    aligned = not (q.data_ptr() % ALIGNMENT or cache.data_ptr() % ALIGNMENT)
    if not aligned or any(stride * q.element_size() % ALIGNMENT for stride in q.stride()[:2]):
        return None
    missing = prompt_attention_missing(
        device=q.device, dtype=q.dtype, cache_dtype=cache.dtype, head_dim=q.shape[2], block_size=cache.shape[2],
        group=q.shape[1] // cache.shape[3], window=window)
    return optional_op("prompt_attention", q.device) if missing is None else None
