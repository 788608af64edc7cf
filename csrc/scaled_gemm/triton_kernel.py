"""Triton: inputs of 8 or 16 bits times FP8 or int8 weights, scaled by row, token, group or block."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early
from ..triton_fp8 import fp8_values
from ..triton_splits import arrived_last, sum_parts


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def scaled_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, scale_row_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    M, N, K, w_stride, blocks, blocks_per_split, x_groups, w_groups,
    W_GROUP: tl.constexpr, X_GROUP: tl.constexpr, X_SCALED: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, FP8_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    """out [M, N] = x [M, K] W^T, one tile of [BLOCK_N outputs, BLOCK_M tokens] a program.

    Weights are the left operand, so that few tokens still fill the matrix instruction's other side. X_GROUP and W_GROUP
    are BLOCK_Ks that share a scale; 0: all of a row do, and it is applied once, at the end. X_SCALED: x is codes, with
    scales [M, x_groups]. w_scale is [R, w_groups], its row of output n scale_row[n] with HAS_ROWS, else n. With SPLIT,
    program (., s) writes part [s, M, N] float32, and the tile's last one adds them up in order; counter is what
    `split_counters` gives. UPCAST multiplies in float32, for the interpreter. FP8_BITS: w is FP8 codes, given as int8.
    """
    start_early(EARLY)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid, split = tl.program_id(0), tl.program_id(1)
    first_n, first_m = (pid % tiles_n) * BLOCK_N, (pid // tiles_n) * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n_in, m_in = n < N, m < M
    scale_row = n
    if HAS_ROWS:
        scale_row = tl.load(scale_row_ptr + n, mask=n_in, other=0)

    INTEGER: tl.constexpr = X_SCALED and x_ptr.dtype.element_ty == tl.int8
    GROUPED: tl.constexpr = W_GROUP > 0 or X_GROUP > 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER and not GROUPED else tl.float32)
    w_at = w_ptr + n[:, None].to(tl.int64) * w_stride + k[None, :]
    x_at = x_ptr + m[None, :].to(tl.int64) * K + k[:, None]
    start = split * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, blocks)):
        first = block * BLOCK_K
        w = tl.load(w_at + first, mask=n_in[:, None], other=0.0)  # rows are padded to whole blocks
        if EVEN_K:
            x = tl.load(x_at + first, mask=m_in[None, :], other=0.0)
        else:
            x = tl.load(x_at + first, mask=m_in[None, :] & (first + k < K)[:, None], other=0.0)
        if FP8_BITS:
            w = fp8_values(w)
        if UPCAST and not INTEGER:
            w, x = w.to(tl.float32), x.to(tl.float32)
        elif not X_SCALED:
            w = w.to(x.dtype)
        if GROUPED:
            if INTEGER:
                sums = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
            else:
                sums = tl.dot(w, x, input_precision="ieee")
            if W_GROUP > 0:
                scale = tl.load(w_scale_ptr + scale_row * w_groups + block // W_GROUP, mask=n_in, other=0.0)
                sums *= scale[:, None]
            if X_GROUP > 0:
                scale = tl.load(x_scale_ptr + m * x_groups + block // X_GROUP, mask=m_in, other=0.0)
                sums *= scale[None, :]
            acc += sums
        elif INTEGER:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        elif X_SCALED:
            # Hopper sums FP8 products in 14 bits; a full float32 addition after each block bounds the loss.
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K, input_precision="ieee")
        else:
            acc = tl.dot(w, x, acc, input_precision="ieee")

    out = acc.to(tl.float32)
    if W_GROUP == 0:
        out *= tl.load(w_scale_ptr + scale_row, mask=n_in, other=0.0)[:, None]
    if X_SCALED and X_GROUP == 0:
        out *= tl.load(x_scale_ptr + m, mask=m_in, other=0.0)[None, :]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    inside = n_in[:, None] & m_in[None, :]
    if SPLIT:
        tl.store(part_ptr + split.to(tl.int64) * M * N + at, out, mask=inside)
        if not arrived_last(counter_ptr + pid, tl.num_programs(1)):
            return
        out = sum_parts(part_ptr + at, M * N, tl.num_programs(1), inside, BLOCK_N, BLOCK_M)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
