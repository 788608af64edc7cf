"""Triton: slots sorted by expert into padded tiles without asking the host, and the weighted sum of their outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early


@triton.jit(do_not_specialize=["S", "max_tiles"])
def align_kernel(
    expert_ptr, slot_ptr, tile_ptr, S, E, max_tiles,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):
    """Program e lays out the slots of expert e; see `align`. BINS: a power of two, at least E."""
    start_early(EARLY)
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, S, CHUNK):
        at = start + tl.arange(0, CHUNK)
        experts = tl.load(expert_ptr + at, mask=at < S, other=-1).to(tl.int32)
        counts += tl.histogram(experts, BINS, mask=experts >= 0)
    tiles = tl.where(bins < E, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.sum(tl.where(bins < e, tiles, 0), axis=0)
    mine = tl.sum(tl.where(bins == e, tiles, 0), axis=0)
    if e == 0:
        for tile in range(tl.sum(tiles, axis=0), max_tiles):
            tl.store(tile_ptr + tile, -1)
    for tile in range(before, before + mine):
        tl.store(tile_ptr + tile, e)
        tl.store(slot_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.full((BLOCK_M,), -1, tl.int32))
    tl.debug_barrier()  # the padding is in place before slots overwrite it
    first = before * BLOCK_M
    for start in range(0, S, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = (tl.load(expert_ptr + at, mask=at < S, other=-1).to(tl.int32) == e).to(tl.int32)
        rank = tl.cumsum(here, axis=0) - 1
        tl.store(slot_ptr + first + rank, at, mask=here > 0)
        first += tl.sum(here, axis=0)


@triton.jit
def store_sum(out_ptr, beside_ptr, at, total, inside, HAS_BESIDE: tl.constexpr):
    """Store float32 `total`, rounded; with `beside` added to that, and rounded again as a second operation would."""
    total = total.to(out_ptr.dtype.element_ty)
    if HAS_BESIDE:
        beside = tl.load(beside_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + beside).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, total, mask=inside)


@triton.jit
def combine_kernel(
    y_ptr, weight_ptr, expert_ptr, beside_ptr, out_ptr, H,
    TOP_K: tl.constexpr, HAS_BESIDE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """out [T, H] = sum over j, in order, of weight [t, j] * y [t * TOP_K + j] in float32, rounded, plus beside [T, H];
    experts of -1 add nothing."""
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = t * TOP_K + j
        if tl.load(expert_ptr + slot) >= 0:  # what nobody wrote may be NaN
            y = tl.load(y_ptr + slot * H + column, mask=column < H, other=0.0).to(tl.float32)
            total += y * tl.load(weight_ptr + slot)
    store_sum(out_ptr, beside_ptr, t * H + column, total, column < H, HAS_BESIDE)
