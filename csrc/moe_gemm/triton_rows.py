"""Triton: slots sorted by expert without padding, inputs rounded to FP8 into their rows, and rows added up by token."""

from __future__ import annotations

import triton
import triton.language as tl

from ..moe_route.triton_kernel import store_sum
from ..triton_early import start_early


@triton.jit(do_not_specialize=["S"])
def sort_kernel(expert_ptr, offset_ptr, row_ptr, S, E, BINS: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """Program e finds the rows of expert e; see `sort_slots`. BINS: a power of two, at least E."""
    start_early(EARLY)
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, S, CHUNK):
        at = start + tl.arange(0, CHUNK)
        experts = tl.load(expert_ptr + at, mask=at < S, other=-1).to(tl.int32)
        counts += tl.histogram(experts, BINS, mask=experts >= 0)
        if e == 0:
            tl.store(row_ptr + at, tl.full((CHUNK,), -1, tl.int32), mask=(at < S) & (experts < 0))
    row = tl.sum(tl.where(bins < e, counts, 0), axis=0)
    tl.store(offset_ptr + e, row)
    for start in range(0, S, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = (tl.load(expert_ptr + at, mask=at < S, other=-1).to(tl.int32) == e).to(tl.int32)
        tl.store(row_ptr + at, row + tl.cumsum(here, axis=0) - 1, mask=here > 0)
        row += tl.sum(here, axis=0)
    if e == E - 1:
        tl.store(offset_ptr + E, row)


@triton.jit
def _rounded(x, FP8_MAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr):
    """(values to be stored as FP8, scale) of one row [BLOCK] float32, as `quantize` has them."""
    size = tl.abs(x)
    scale = tl.maximum(tl.math.div_rn(tl.max(size, axis=0), FP8_MAX), SCALE_MIN)
    finite = tl.max((~(size < float("inf"))).to(tl.int32), axis=0) == 0
    values = tl.math.div_rn(x, tl.zeros((BLOCK,), tl.float32) + scale)
    return tl.minimum(tl.maximum(values, -FP8_MAX), FP8_MAX), tl.where(finite, scale, float("nan"))


@triton.jit
def scatter_kernel(
    x_ptr, row_ptr, codes_ptr, scale_ptr, K,
    TOP_K: tl.constexpr, FP8_MAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """Program t rounds token t of x [T, K] once, into the rows of all its slots."""
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)
    values, scale = _rounded(x, FP8_MAX, SCALE_MIN, BLOCK)
    codes = values.to(codes_ptr.dtype.element_ty)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_ptr + t * TOP_K + j).to(tl.int64)
        if row >= 0:
            tl.store(codes_ptr + row * K + k, codes, mask=k < K)
            tl.store(scale_ptr + row, scale)


@triton.jit
def silu_kernel(
    x_ptr, end_ptr, codes_ptr, scale_ptr, K, FP8_MAX: tl.constexpr, SCALE_MIN: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program r: silu(gate) * up of row r of x [rows, 2 K] = (gate, up), rounded; rows from end [1] on are nobody's."""
    start_early(EARLY)
    r = tl.program_id(0).to(tl.int64)
    if r < tl.load(end_ptr):
        k = tl.arange(0, BLOCK)
        gate = tl.load(x_ptr + r * 2 * K + k, mask=k < K, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + r * 2 * K + K + k, mask=k < K, other=0.0).to(tl.float32)
        values, scale = _rounded(gate / (1.0 + tl.exp(-gate)) * up, FP8_MAX, SCALE_MIN, BLOCK)
        tl.store(codes_ptr + r * K + k, values.to(codes_ptr.dtype.element_ty), mask=k < K)
        tl.store(scale_ptr + r, scale)


@triton.jit
def add_rows_kernel(
    y_ptr, weight_ptr, row_ptr, beside_ptr, out_ptr, H, TOP_K: tl.constexpr, HAS_BESIDE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """out [T, H] = sum over j, in order, of weight [t, j] * y [row [t, j]] in float32, rounded, plus beside [T, H];
    rows of -1 add nothing."""
    start_early(EARLY)
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_ptr + t * TOP_K + j).to(tl.int64)
        if row >= 0:
            y = tl.load(y_ptr + row * H + column, mask=column < H, other=0.0).to(tl.float32)
            total += y * tl.load(weight_ptr + t * TOP_K + j)
    store_sum(out_ptr, beside_ptr, t * H + column, total, column < H, HAS_BESIDE)


@triton.jit
def _row_of(expert_ptr, row_ptr, offset_ptr, slot, first, last):
    """(expert, row) of a slot, the row counted from the first of expert `first`; -1 for none of [first, last)."""
    expert = tl.load(expert_ptr + slot).to(tl.int32)
    row = tl.load(row_ptr + slot) - tl.load(offset_ptr + first)
    return expert, tl.where((expert >= first) & (expert < last), row, -1).to(tl.int64)


@triton.jit
def scatter_rows_kernel(
    x_ptr, expert_ptr, row_ptr, offset_ptr, order_ptr, out_ptr, K, first, last,
    TOP_K: tl.constexpr, HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """Program (slot, i): a block of its token of x [T, K] to the slot's row of out, in the order [E, K] of its expert's
    inputs."""
    start_early(EARLY)
    slot = tl.program_id(0)
    expert, row = _row_of(expert_ptr, row_ptr, offset_ptr, slot, first, last)
    if row >= 0:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = k
        if HAS_ORDER:
            column = tl.load(order_ptr + expert.to(tl.int64) * K + k, mask=k < K, other=0)
        x = tl.load(x_ptr + (slot // TOP_K).to(tl.int64) * K + column, mask=k < K, other=0.0)
        tl.store(out_ptr + row * K + k, x, mask=k < K)


@triton.jit
def gated_rows_kernel(
    gate_ptr, up_ptr, expert_ptr, row_ptr, offset_ptr, order_ptr, out_ptr, K, first, last,
    HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """Program (slot, i): silu(gate) * up of a block of the slot's row, in the order [E, K] of its expert's values."""
    start_early(EARLY)
    expert, row = _row_of(expert_ptr, row_ptr, offset_ptr, tl.program_id(0), first, last)
    if row >= 0:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = k
        if HAS_ORDER:
            column = tl.load(order_ptr + expert.to(tl.int64) * K + k, mask=k < K, other=0)
        gate = tl.load(gate_ptr + row * K + column, mask=k < K, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * K + column, mask=k < K, other=0.0).to(tl.float32)
        out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + row * K + k, out.to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def place_rows_kernel(
    y_ptr, expert_ptr, row_ptr, offset_ptr, out_ptr, H, first, last, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):
    """Program (slot, i): a block of the slot's row of y to the same row, counted from the first of all, of out."""
    start_early(EARLY)
    slot = tl.program_id(0)
    _, row = _row_of(expert_ptr, row_ptr, offset_ptr, slot, first, last)
    if row >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + row * H + column, mask=column < H, other=0.0)
        tl.store(out_ptr + tl.load(row_ptr + slot).to(tl.int64) * H + column, y, mask=column < H)
