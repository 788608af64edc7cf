"""Plain torch paged attention: one request at a time, exact, on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def write_kv(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store K and V of new tokens.

    Args:
        cache: [2, num_blocks, block_size, kv_heads, D]. k, v: [T, kv_heads, D]. slots: [T] int64, block * block_size
            + offset.
    """
    flat = cache.flatten(1, 2)
    flat[0].index_copy_(0, slots, k)
    flat[1].index_copy_(0, slots, v)


def gather_kv(cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V of one request, each [length, kv_heads, D], from its block numbers [ceil(length / block_size)]."""
    kv = cache.index_select(1, blocks).flatten(1, 2)
    return kv[0, :length], kv[1, :length]


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
