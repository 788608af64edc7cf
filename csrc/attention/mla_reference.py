"""Plain torch multi-head latent attention (arXiv 2405.04434, section 2.1): one request at a time, on every device.

What is cached of a token is one row [C + R] for all heads: the normalised latent c [C] and the rotated key k_pe [R].
Head h has k_nope = w_uk[h] c and v = w_uv[h] c, so that attention can be computed in two ways:

* absorbed: q_nope w_uk[h] meets the latents themselves, as one key head of width C + R; w_uv[h] comes last;
* expanded: k and v of every head are made first, a chunk of tokens at a time, and chunks are merged by their sums.

Shapes: q_nope [Q, H, N], q_pe [Q, H, R], rows [L, C + R], w_uk [H, N, C], w_uv [H, V, C]; the queries are the last Q
of the L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import bits, decode, encode

# Scores held at once, in values: bounds the memory of a long prompt with many heads (128 MiB in float32).
SCORES = 1 << 25


class State(NamedTuple):
    """Attention over some keys: out [Q, H, V], and lse [Q, H], the logarithm of the sum of exp(score)."""

    out: Tensor
    lse: Tensor


def write_rows(cache: Tensor, rows: Tensor, slots: Tensor, *, scale: float = 1.0) -> None:
    """Store the rows [T, W] of new tokens in cache [1, num_blocks, block_size, 1, W] at slots [T] int64."""
    bits(cache).view(-1, cache.shape[-1]).index_copy_(0, slots, encode(rows, cache.dtype, scale))


def gather_rows(cache: Tensor, blocks: Tensor, length: int, dtype: torch.dtype | None = None, *,
                scale: float = 1.0) -> Tensor:
    """The rows [length, W] of one request from its block numbers [ceil(length / block_size)], in `dtype`."""
    rows = bits(cache)[0].index_select(0, blocks).view(-1, cache.shape[-1])[:length]
    return decode(rows, cache.dtype, scale, dtype)


def absorbing_is_cheaper(q_len: int, length: int, *, latent: int, nope: int, value: int) -> bool:
    """Whether the absorbed form takes fewer multiplications: short queries over a long context."""
    expand = latent * (nope + value)
    return q_len * (expand + length * (2 * latent - nope - value)) < length * expand


def absorb(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """q_nope through w_uk: queries of the latents, [Q, H, C]."""
    return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)


def project_values(context: Tensor, w_uv: Tensor) -> Tensor:
    """Averaged latents [Q, H, C] through w_uv: [Q, H, V]."""
    out = context.new_empty(*context.shape[:2], w_uv.shape[1])
    torch.bmm(context.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))  # heads behind tokens: no copy
    return out


def attend_rows(q: Tensor, rows: Tensor, latent: int, *, scale: float) -> Tensor:
    """Absorbed queries q [Q, H, C + R] over all heads' one row per token: averaged latents [Q, H, C], C = `latent`."""
    (count, heads, width), length = q.shape, len(rows)
    tile, out = max(1, SCORES // (heads * length)), []
    for start in range(0, count, tile):
        part = q[start : start + tile]
        scores = (part.reshape(-1, width) @ rows.T).to(_exact(q)).mul_(scale).view(len(part), heads, length)
        if (hidden := _hidden(length - count + start, len(part), 0, length, q.device)) is not None:
            scores.masked_fill_(hidden[:, None], float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        out.append((weights.view(-1, length) @ rows[:, :latent]).view(len(part), heads, latent))
    return torch.cat(out)


def attend_expanded(q: Tensor, rows: Callable[[int, int], Tensor], length: int, w_kv: Tensor, *, value: int,
                    scale: float, chunk: int) -> Tensor:
    """Attention with k and v made from the latents, `chunk` tokens at a time.

    Args:
        q: [Q, H, N + R], (q_nope, q_pe). rows: gives rows [start, stop) of the L = `length` tokens.
        w_kv: [H, N + V, C], each head's w_uk above its w_uv. value: V.
    Returns:
        [Q, H, V].
    """
    count, heads = q.shape[:2]
    first = length - count
    total = State(q.new_zeros(count, heads, value, dtype=_exact(q)),
                  q.new_full((count, heads), float("-inf"), dtype=_exact(q)))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        k, v = expand(rows(start, stop), w_kv, value)
        tile = max(1, SCORES // (heads * (stop - start)))
        for at in range(max(0, start - first), count, tile):  # queries before the chunk see nothing of it
            these = slice(at, min(at + tile, count))
            hidden = _hidden(first + at, these.stop - at, start, stop, q.device)
            state = merge(State(total.out[these], total.lse[these]), attend_state(q[these], k, v, hidden, scale=scale))
            total.out[these], total.lse[these] = state
    return total.out.to(q.dtype)


def expand(rows: Tensor, w_kv: Tensor, value: int) -> tuple[Tensor, Tensor]:
    """k [L, H, N + R] and v [L, H, V] of every head."""
    heads, out, latent = w_kv.shape
    k_nope, v = (rows[:, :latent] @ w_kv.flatten(0, 1).T).view(len(rows), heads, out).split((out - value, value), -1)
    return torch.cat((k_nope, rows[:, None, latent:].expand(-1, heads, -1)), -1), v


def attend_state(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, *, scale: float) -> State:
    """q [Q, H, D] over k [L, H, D] and v [L, H, V]; `hidden` [Q, L] marks what a query must not see (never all)."""
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)).to(_exact(q)).mul_(scale)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_().to(v.dtype)
    return State((weights @ v.transpose(0, 1)).transpose(0, 1).to(lse.dtype), lse.T)


def merge(a: State, b: State) -> State:
    """Attention over the keys of both, exactly; either may have seen nothing (lse -inf)."""
    lse = torch.logaddexp(a.lse, b.lse)
    seen = lse.masked_fill(lse.isneginf(), 0.0)  # keeps exp(-inf - -inf) out
    return State(a.out * (a.lse - seen).exp()[..., None] + b.out * (b.lse - seen).exp()[..., None], lse)


def _exact(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _hidden(first: int, count: int, start: int, stop: int, device: torch.device) -> Tensor | None:
    """[count, stop - start]: keys after the query; queries from position `first` on. None when nothing is hidden."""
    if stop <= first + 1:
        return None
    return torch.arange(start, stop, device=device) > torch.arange(first, first + count, device=device)[:, None]
