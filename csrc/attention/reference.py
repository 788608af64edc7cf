"""Plain torch paged attention: one request at a time, exact, on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def write_kv(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, k_scale: float = 1.0,
             v_scale: float = 1.0) -> None:
    """Store K and V of new tokens.

    Args:
        cache: [2, num_blocks, block_size, kv_heads, D]; a float8_e4m3fn value times its scale is the value. k, v: [T,
            kv_heads, D]. slots: [T] int64, block * block_size + offset.
    """
    flat = bits(cache.flatten(1, 2))
    flat[0].index_copy_(0, slots, encode(k, cache.dtype, k_scale))
    flat[1].index_copy_(0, slots, encode(v, cache.dtype, v_scale))


def gather_kv(cache: Tensor, blocks: Tensor, length: int, dtype: torch.dtype | None = None, *, k_scale: float = 1.0,
              v_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """K and V of one request, each [length, kv_heads, D] in `dtype` (None: the cache's own).

    Args:
        blocks: its block numbers [ceil(length / block_size)].
    """
    kv = bits(cache).index_select(1, blocks).flatten(1, 2)[:, :length]
    return decode(kv[0], cache.dtype, k_scale, dtype), decode(kv[1], cache.dtype, v_scale, dtype)


def encode(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x as a cache of `dtype` keeps it: itself, or FP8 codes of x / scale, held inside the range, as bytes."""
    if dtype.itemsize > 1:
        return x
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp_(-most, most).to(dtype).view(torch.uint8)


def decode(x: Tensor, kept: torch.dtype, scale: float, dtype: torch.dtype | None) -> Tensor:
    """What `encode` stored in a cache of dtype `kept`, in `dtype`."""
    return x if kept.itemsize > 1 else x.view(kept).float().mul_(scale).to(dtype)


def bits(cache: Tensor) -> Tensor:
    """A cache of bytes as bytes: torch indexes no FP8."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None,
           causal: bool = False) -> Tensor:
    """Attention of one request.

    Args:
        q: [Q, heads, D]. k, v: [L, kv_heads, D]; kv_heads divides heads. mask: [Q, L] added to the scores.
        causal: q and k are the same Q = L tokens.
    Returns:
        [Q, heads, D].

    Decoding (Q = 1) folds the heads that share a KV head into the query length, so that nothing is repeated.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if q.shape[0] == 1:
        grouped = q.view(1, kv_heads, heads // kv_heads, q.shape[2])
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).reshape(q.shape)
    out = scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=causal,
                                       scale=scale, enable_gqa=heads != kv_heads)
    return out[0].transpose(0, 1)


def causal_mask(q_len: int, length: int, window: int | None, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[q_len, length] of 0 and -inf for queries at the last `q_len` positions; `window` counts the query itself."""
    query = torch.arange(length - q_len, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(q_len, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
