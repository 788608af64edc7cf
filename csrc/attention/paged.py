"""Attention of a ragged batch by the Triton kernel: over K and V, over latent rows, or over keys made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..launch import early, multiprocessors
from .cache import HeadNorms
from .prompt import ROWS, prompt_attention_op

LOG2E = 1.4426950408889634
# The smallest side of a matrix product in Triton.
MIN_DOT = 16
# Programs for each multiprocessor that splits of the keys are to bring about, and the most splits.
WAVES = 2
MAX_SPLITS = 64
# Fewest keys of a split: what a program reads at once. One request's attention to 200 keys took 6.4 us on an H100, with
# 128 keys a split 7.6.
MIN_SHARE = 64
# Values of one program of the merge, by head width.
MERGE_WIDTH = 64
# From more rows (queries x heads of a group) of one request on, the compiled kernel for prompts takes a batch.
FEW_ROWS = 64
# Shared memory of a multiprocessor that no program can have, in bytes.
RESERVED = 1024


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Requests of a step one after another, on the device (R requests, T tokens).

    Attributes:
        query_start: [R + 1] int32, where each request's queries begin in the batch, and T.
        seq_lens: [R] int32, keys of each, its queries' own included; 0 for a row that only pads (it gets zeros).
        block_table: [R, B] int32, rows valid up to ceil(seq_len / block_size).
        max_query_len: the most queries of one request. With 1, and T = R, every row has one query.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """Rows (queries x heads of a group) and keys of one program, its warps and the depth of its pipeline.

    Over a paged cache one stage of the pipeline reads the block table, and the rest hold keys.
    """

    m: int
    n: int
    warps: int
    stages: int


# By reasoning for an H100 (227 KiB of shared memory a program, wgmma from 64 rows on), and what its compiler makes of
# them: a prompt wants large tiles, and one query a request small programs, of which several find room on a
# multiprocessor (32 requests of 200 keys: 15.5 us, with 4 warps and 5 stages 19.3). Latent tiles have few rows, since a
# program holds their sums, 512 wide, in registers.
TILES = (AttentionTile(m=16, n=64, warps=2, stages=4), AttentionTile(m=64, n=64, warps=4, stages=3),
         AttentionTile(m=128, n=64, warps=8, stages=3))
LATENT = (AttentionTile(m=16, n=64, warps=8, stages=3), AttentionTile(m=32, n=64, warps=8, stages=3))


def attend_paged(q: Tensor, cache: Tensor, batch: Ragged, *, scale: float, window: int | None = None,
                 k_scale: float = 1.0, v_scale: float = 1.0, splits: int | None = None,
                 tile: AttentionTile | None = None) -> Tensor:
    """Causal attention over the paged cache; whatever q's rows attend to is already stored. Prompts have a compiled
    kernel on Hopper, where it is built (csrc/attention/prompt_attention.cu) and no `splits` or `tile` is asked for.

    Args:
        q: [T, heads, D] of 16 or 32 bits, any strides but the last. cache: [2, num_blocks, block_size, kv_heads, D] in
            q's dtype, or float8_e4m3fn, whose values stand for themselves times `k_scale` and `v_scale`.
        window: a query sees that many keys, itself included. splits, tile: None takes what suits the batch.
    Returns:
        [T, heads, D].
    """
    main, group = _main_part(q.shape[2]), q.shape[1] // cache.shape[3]
    # Few queries of few requests over many keys want splits of the keys, which that kernel has not.
    many = batch.max_query_len * group > FEW_ROWS and (
        batch.max_query_len * group > ROWS or len(batch.seq_lens) * cache.shape[3] >= multiprocessors(q.device))
    op = prompt_attention_op(q, cache, window) if many and splits is None and tile is None else None
    if op is not None:
        out, counter = q.new_empty(q.shape), q.new_zeros(1, dtype=torch.int32)
        op(out, counter, q, cache, batch.query_start, batch.seq_lens, batch.block_table, scale * k_scale, v_scale)
        return out
    k, v = cache.flatten(1, 2)
    return _launch(q[..., :main], q[..., main:], k[..., :main], k[..., main:], v, batch, group=group,
                   page=cache.shape[2], key_start=None, qk_scale=scale * k_scale, v_scale=v_scale, window=window,
                   splits=splits, tile=tile)


def rope_and_attend(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, batch: Ragged, *, heads: int,
                    scale: float, norms: HeadNorms | None = None, window: int | None = None, k_scale: float = 1.0,
                    v_scale: float = 1.0, splits: int | None = None, tile: AttentionTile | None = None) -> Tensor:
    """`rope_and_cache`, then `attend_paged`, in one launch, for requests with one query each (T = R).

    Args:
        qkv, cos, sin, slots, norms: as for `rope_and_cache`; a request with no keys stores nothing. The others: as for
            `attend_paged`.
    Returns:
        [R, heads, D].
    """
    from .triton_decode import decode_kernel

    assert batch.max_query_len == 1 and len(qkv) == len(batch.seq_lens)
    page, kv_heads, width = cache.shape[2:]
    group, q = heads // kv_heads, qkv.view(len(qkv), -1, width)[:, :heads]
    if len(qkv) == 0:
        return q.new_empty(q.shape)
    if tile is None:
        tile = tile_for(group, TILES, 2 * width * qkv.element_size(), 1, qkv.device)
    tile = replace(tile, m=max(tile.m, _pow2(group)))
    plan = _plan(len(qkv), kv_heads, batch, 1, page, splits, q)
    out, target, lse = plan.outputs(q, width)
    k, v = cache.flatten(1, 2)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    decode_kernel[plan.grid](
        qkv, cos, sin, q_weight, k_weight, k, v, slots, target, lse, batch.seq_lens, batch.block_table,
        qkv.stride(0), cos.stride(0), k.stride(0), k.stride(1), batch.block_table.stride(0), scale * k_scale * LOG2E,
        k_scale, v_scale, eps,
        GROUP=group, KV_HEADS=kv_heads, D=width, D_PAD=_padded(width), PAGE=page, WINDOW=window or 0,
        HAS_NORM=norms is not None, FP8=cache.dtype == torch.float8_e4m3fn, IN_PARTS=plan.splits > 1,
        MIN_SHARE=MIN_SHARE, UPCAST=_upcast(q), BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
        num_stages=tile.stages, **early(qkv.device))
    return plan.merged(out, target, lse)


def attend_plain(q: Tensor, q_pe: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, batch: Ragged, key_start: Tensor, *,
                 scale: float, tile: AttentionTile | None = None) -> Tensor:
    """Causal attention over keys that are together in memory, each request's from key_start on ([R] int32).

    Args:
        q: [T, heads, N]. q_pe: [T, heads, R]. k: [L, heads, N]. k_pe: [L, 1, R], of all heads. v: [L, heads, V].
    Returns:
        [T, heads, V].
    """
    return _launch(q, q_pe, k, k_pe, v, batch, group=1, page=0, key_start=key_start, qk_scale=scale, v_scale=1.0,
                   window=None, splits=1, tile=tile)


def attend_latent(q: Tensor, q_pe: Tensor, cache: Tensor, batch: Ragged, *, scale: float, kv_scale: float = 1.0,
                  splits: int | None = None, tile: AttentionTile | None = None) -> Tensor:
    """Absorbed latent attention (arXiv 2405.04434): all heads read one row [C + R], its first C values as the values.

    Args:
        q: [T, heads, C], queries of the latents. q_pe: [T, heads, R]. cache: [1, num_blocks, block_size, 1, C + R].
    Returns:
        [T, heads, C], averaged latents.
    """
    from .triton_mla import latent_attention_kernel

    tokens, heads, latent = q.shape
    if tokens == 0:
        return q.new_empty(q.shape)
    page, width, pe = cache.shape[2], cache.shape[4], q_pe.shape[2]
    if tile is None:
        tile = tile_for(batch.max_query_len * heads, LATENT, width * q.element_size(), 1, q.device)
    group = next(size for size in range(min(heads, tile.m), 0, -1) if heads % size == 0)
    plan = _plan(tokens, heads // group, batch, tile.m // group, page, splits, q)
    out, target, lse = plan.outputs(q, latent)
    latent_attention_kernel[plan.grid](
        q, q_pe, cache, target, lse, batch.query_start, batch.seq_lens, batch.block_table, len(batch.seq_lens), heads,
        q.stride(0), q.stride(1), q_pe.stride(0), q_pe.stride(1), width, batch.block_table.stride(0),
        scale * kv_scale * LOG2E, kv_scale,
        GROUP=group, C=latent, R=pe, C_PAD=_padded(latent), R_PAD=_padded(pe), PAGE=page, ONE_QUERY=plan.one_query,
        IN_PARTS=plan.splits > 1, MIN_SHARE=MIN_SHARE, UPCAST=_upcast(q), BLOCK_Q=tile.m // group, BLOCK_M=tile.m,
        BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **early(q.device))
    return plan.merged(out, target, lse)


def splits_for(programs: int, max_len: int, device: torch.device) -> int:
    """Into how many parts to split the keys of a batch of so many programs, whatever the lengths turn out to be."""
    wanted = (WAVES * multiprocessors(device) + programs // 2) // programs
    return max(1, min(wanted, MAX_SPLITS, -(-max_len // MIN_SHARE)))


def tile_for(rows: int, tiles: tuple[AttentionTile, ...], key_bytes: int, ahead: int,
             device: torch.device) -> AttentionTile:
    """The first tile that holds a request's rows, else the last, with as much of its pipeline as fits the device.

    Args:
        rows: queries x heads of a group. key_bytes: of one key and its value. ahead: stages that hold no keys.
    """
    tile = next((tile for tile in tiles if rows <= tile.m), tiles[-1])
    if device.type == "cpu":
        return tile
    room = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - RESERVED
    return shrunk(tile, key_bytes, ahead, room)


def shrunk(tile: AttentionTile, key_bytes: int, ahead: int, room: int) -> AttentionTile:
    """`tile` with fewer stages, then fewer keys, then fewer rows, until queries and pipeline fit `room` bytes."""
    while (tile.m + tile.n * (tile.stages - ahead)) * key_bytes > room:
        if tile.stages > ahead + 1:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.n > MIN_DOT:
            tile = replace(tile, n=tile.n // 2)
        elif tile.m > MIN_DOT:
            tile = replace(tile, m=tile.m // 2)
        else:
            break
    return tile


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a batch is laid over programs."""

    grid: tuple[int, int, int]
    one_query: bool

    @property
    def splits(self) -> int:
        return self.grid[2]

    def outputs(self, q: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(result [T, heads, width], what the kernel writes: that or its parts, sums of the parts)."""
        out = q.new_empty(*q.shape[:2], width)
        if self.splits == 1:
            return out, out, out
        parts = q.new_empty(*q.shape[:2], self.splits, width, dtype=torch.float32)
        return out, parts, q.new_empty(parts.shape[:3], dtype=torch.float32)

    def merged(self, out: Tensor, parts: Tensor, lse: Tensor) -> Tensor:
        from .triton_paged import merge_kernel

        if self.splits > 1:
            width = out.shape[2]
            block = min(MERGE_WIDTH, _padded(width))
            merge_kernel[(out.shape[0] * out.shape[1], -(-width // block))](
                parts, lse, out, self.splits, D_V=width, SPLITS_PAD=_pow2(self.splits), BLOCK_D=block,
                **early(out.device))
        return out


def _plan(tokens: int, kv_heads: int, batch: Ragged, block_q: int, page: int, splits: int | None, q: Tensor) -> _Plan:
    requests = len(batch.seq_lens)
    one_query = batch.max_query_len == 1 and tokens == requests
    if splits is None:
        longest = batch.block_table.shape[1] * page
        splits = splits_for(requests * kv_heads, longest, q.device) if batch.max_query_len <= block_q else 1
    return _Plan(grid=(requests if one_query else tokens // block_q + requests, kv_heads, splits), one_query=one_query)


def _launch(q: Tensor, q_tail: Tensor, k: Tensor, k_tail: Tensor, v: Tensor, batch: Ragged, *, group: int, page: int,
            key_start: Tensor | None, qk_scale: float, v_scale: float, window: int | None, splits: int | None,
            tile: AttentionTile | None) -> Tensor:
    """q [T, heads, D] and its tail [T, heads, D_TAIL] over k, k_tail and v [slots, heads or 1, width]."""
    from .triton_paged import attention_kernel

    tokens, heads, main = q.shape
    tail, width = q_tail.shape[2], v.shape[2]
    if tokens == 0:
        return q.new_empty(0, heads, width)
    if tile is None:
        tile = tile_for(batch.max_query_len * group, TILES, (main + tail + width) * q.element_size(), int(page > 0),
                        q.device)
    tile = replace(tile, m=max(tile.m, _pow2(group)))
    plan = _plan(tokens, heads // group, batch, tile.m // group, page, splits, q)
    out, target, lse = plan.outputs(q, width)
    attention_kernel[plan.grid](
        q, q_tail, k, k_tail, v, target, lse,
        batch.query_start, batch.seq_lens if key_start is None else key_start, batch.seq_lens, batch.block_table,
        len(batch.seq_lens), heads,
        q.stride(0), q.stride(1), q_tail.stride(0), q_tail.stride(1), *_strides(k), *_strides(k_tail), *_strides(v),
        batch.block_table.stride(0),
        qk_scale * LOG2E, v_scale,
        GROUP=group, D=main, D_TAIL=tail, D_V=width, D_PAD=_padded(main), TAIL_PAD=_padded(tail), V_PAD=_padded(width),
        PAGE=page, WINDOW=window or 0, ONE_QUERY=plan.one_query, IN_PARTS=plan.splits > 1, MIN_SHARE=MIN_SHARE,
        UPCAST=_upcast(q), BLOCK_Q=tile.m // group, BLOCK_M=tile.m, BLOCK_N=tile.n,
        num_warps=tile.warps, num_stages=tile.stages, **early(q.device))
    return plan.merged(out, target, lse)


def _main_part(width: int) -> int:
    """The largest power of two in a head's width: the rest is a product of its own, instead of padding up to twice."""
    main = 1 << (width.bit_length() - 1)
    return main if main >= MIN_DOT else width


def _pow2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _padded(width: int) -> int:
    return max(MIN_DOT, _pow2(width))


def _upcast(q: Tensor) -> bool:
    """Triton's interpreter takes no products of bfloat16."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _strides(x: Tensor) -> tuple[int, int]:
    """Of a slot and of a head; a head that all share has none."""
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0
