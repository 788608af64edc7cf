"""Triton: the products of a layer of experts, rows gathered by expert, gate and up joined by their activation."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early
from ..triton_fp8 import fp8_values
from ..w4a16_gemm.triton_unpack import unpacked


@triton.jit
def _coded(
    x_at, row_in, w_ptr, scale_ptr, scale_row_ptr, x_scale_ptr, rows, n, n_in,
    K, w_stride, x_groups, w_groups,
    KIND_PLAIN: tl.constexpr, W_GROUP: tl.constexpr, X_GROUP: tl.constexpr, X_SCALED: tl.constexpr,
    HAS_ROWS: tl.constexpr, UPCAST: tl.constexpr, FP8_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: rows of one expert's weights, one value a code, times gathered inputs, scaled."""
    k = tl.arange(0, BLOCK_K)
    scale_row = n
    if HAS_ROWS:
        scale_row = tl.load(scale_row_ptr + n, mask=n_in, other=0)
    INTEGER: tl.constexpr = X_SCALED and w_ptr.dtype.element_ty == tl.int8
    GROUPED: tl.constexpr = W_GROUP > 0 or X_GROUP > 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER and not GROUPED else tl.float32)
    w_at = w_ptr + n[:, None].to(tl.int64) * w_stride + k[None, :]
    for block in range(0, w_stride // BLOCK_K):
        first = block * BLOCK_K
        w = tl.load(w_at + first, mask=n_in[:, None], other=0.0)
        x = tl.load(x_at + (first + k)[:, None], mask=row_in[None, :] & (first + k < K)[:, None], other=0.0)
        if FP8_BITS:
            w = fp8_values(w)
        if UPCAST and not INTEGER:
            w, x = w.to(tl.float32), x.to(tl.float32)
        elif not X_SCALED and not KIND_PLAIN:
            w = w.to(x.dtype)
        if GROUPED:
            if INTEGER:
                sums = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
            else:
                sums = tl.dot(w, x, input_precision="ieee")
            if W_GROUP > 0:
                scale = tl.load(scale_ptr + scale_row * w_groups + block // W_GROUP, mask=n_in, other=0.0)
                sums *= scale[:, None]
            if X_GROUP > 0:
                scale = tl.load(x_scale_ptr + rows * x_groups + block // X_GROUP, mask=row_in, other=0.0)
                sums *= scale[None, :]
            acc += sums
        elif INTEGER:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        elif X_SCALED:
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K, input_precision="ieee")
        else:
            acc = tl.dot(w, x, acc, input_precision="ieee")
    out = acc.to(tl.float32)
    if W_GROUP == 0 and not KIND_PLAIN:
        out *= tl.load(scale_ptr + scale_row, mask=n_in, other=0.0)[:, None]
    if X_SCALED and X_GROUP == 0:
        out *= tl.load(x_scale_ptr + rows, mask=row_in, other=0.0)[None, :]
    return out


@triton.jit
def _packed(
    x_at, row_in, code_ptr, scale_ptr, zero_ptr, order_ptr, n, n_in, N, K, blocks,
    BLOCKS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: as `_coded`, of codes packed as `w4a16_gemm.PackedCodes` says."""
    BYTES: tl.constexpr = BLOCK_K * WIDTH // 8
    j = tl.arange(0, BYTES)
    strip = (n // 64).to(tl.int64) * blocks * 64 + n % 64
    code_at = code_ptr + strip[:, None] * BYTES + j[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(0, blocks):
        packed = tl.load(code_at + block * (64 * BYTES), mask=n_in[:, None], other=0)
        group = 0
        if BLOCKS_PER_GROUP > 0:
            group = block // BLOCKS_PER_GROUP
        scale = tl.load(scale_ptr + group * N + n, mask=n_in, other=0.0).to(tl.float32)
        zero = tl.zeros((BLOCK_N,), tl.int8) + ZERO
        if HAS_ZEROS:
            zero = tl.load(zero_ptr + group * N + n, mask=n_in, other=0)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in tl.static_range(8 // WIDTH):
            columns = block * BLOCK_K + part * BYTES + j
            inside = row_in[None, :] & (columns < K)[:, None]
            if HAS_ORDER:
                columns = tl.load(order_ptr + columns, mask=columns < K, other=0)
            x = tl.load(x_at + columns[:, None], mask=inside, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            sums = tl.dot(unpacked(packed, zero, x.dtype, part, WIDTH), x, sums, input_precision="ieee")
        acc += sums * scale[:, None]
    return acc


@triton.jit
def _tile(slot_ptr, tile_ptr, max_tiles, N, ROWS_PER_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(expert, outputs, slots, rows of the input) of this program; expert -1 has nothing to do."""
    tile, first_n = tl.program_id(0) % max_tiles, tl.program_id(0) // max_tiles * BLOCK_N
    expert = tl.load(tile_ptr + tile)
    n = first_n + tl.arange(0, BLOCK_N)
    slots = tl.load(slot_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    return expert, n, slots, slots // ROWS_PER_SLOT


@triton.jit
def _store(out_ptr, out, slots, n, N, n_in):
    at = slots[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=n_in[:, None] & (slots >= 0)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def coded_experts_kernel(
    x_ptr, x_scale_ptr, slot_ptr, tile_ptr, out_ptr,
    w_ptr, scale_ptr, scale_row_ptr, up_ptr, up_scale_ptr, up_scale_row_ptr,
    max_tiles, N, K, w_stride, code_stride, x_groups, w_groups, scale_stride, up_scale_stride,
    GATED: tl.constexpr, ROWS_PER_SLOT: tl.constexpr, KIND_PLAIN: tl.constexpr, W_GROUP: tl.constexpr,
    X_GROUP: tl.constexpr, X_SCALED: tl.constexpr, HAS_ROWS: tl.constexpr, UPCAST: tl.constexpr,
    FP8_BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    """out [slots, N] = x[slot // ROWS_PER_SLOT] W_e^T, W one value a code, rows `w_stride` and experts `code_stride`
    apart; GATED: silu of it times the same of `up`."""
    start_early(EARLY)
    expert, n, slots, rows = _tile(slot_ptr, tile_ptr, max_tiles, N, ROWS_PER_SLOT, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    n_in, row_in = n < N, slots >= 0
    x_at = x_ptr + rows[None, :].to(tl.int64) * K
    base = expert.to(tl.int64) * code_stride
    out = _coded(x_at, row_in, w_ptr + base, scale_ptr + expert * scale_stride, scale_row_ptr, x_scale_ptr, rows,
                 n, n_in, K, w_stride, x_groups, w_groups, KIND_PLAIN, W_GROUP, X_GROUP, X_SCALED, HAS_ROWS, UPCAST,
                 FP8_BITS, BLOCK_M, BLOCK_N, BLOCK_K)
    if GATED:
        up = _coded(x_at, row_in, up_ptr + base, up_scale_ptr + expert * up_scale_stride, up_scale_row_ptr, x_scale_ptr,
                    rows, n, n_in, K, w_stride, x_groups, w_groups, KIND_PLAIN, W_GROUP, X_GROUP, X_SCALED, HAS_ROWS,
                    UPCAST, FP8_BITS, BLOCK_M, BLOCK_N, BLOCK_K)
        out = out / (1.0 + tl.exp(-out)) * up
    _store(out_ptr, out, slots, n, N, n_in)


@triton.jit(do_not_specialize=["max_tiles"])
def packed_experts_kernel(
    x_ptr, slot_ptr, tile_ptr, out_ptr,
    code_ptr, scale_ptr, zero_ptr, order_ptr, up_ptr, up_scale_ptr, up_zero_ptr, up_order_ptr,
    max_tiles, N, K, blocks, code_stride, groups,
    GATED: tl.constexpr, ROWS_PER_SLOT: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ZERO: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_ORDER: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    """As `coded_experts_kernel`, of codes packed as `w4a16_gemm.PackedCodes` says, `code_stride` bytes an expert."""
    start_early(EARLY)
    expert, n, slots, rows = _tile(slot_ptr, tile_ptr, max_tiles, N, ROWS_PER_SLOT, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    n_in, row_in = n < N, slots >= 0
    x_at = x_ptr + rows[None, :].to(tl.int64) * K
    base = expert.to(tl.int64) * code_stride
    table, order = expert.to(tl.int64) * groups * N, expert * K
    out = _packed(x_at, row_in, code_ptr + base, scale_ptr + table, zero_ptr + table, order_ptr + order, n, n_in, N, K,
                  blocks, BLOCKS_PER_GROUP, WIDTH, ZERO, HAS_ZEROS, HAS_ORDER, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    if GATED:
        up = _packed(x_at, row_in, up_ptr + base, up_scale_ptr + table, up_zero_ptr + table, up_order_ptr + order, n,
                     n_in, N, K, blocks, BLOCKS_PER_GROUP, WIDTH, ZERO, HAS_ZEROS, HAS_ORDER, UPCAST,
                     BLOCK_M, BLOCK_N, BLOCK_K)
        out = out / (1.0 + tl.exp(-out)) * up
    _store(out_ptr, out, slots, n, N, n_in)
