"""Triton: 16-bit inputs times codes of 2, 4 or 8 bits, unpacked in registers, summed and scaled in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early
from ..triton_splits import arrived_last, sum_parts
from .triton_unpack import unpacked


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def w4a16_kernel(
    x_ptr, code_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    M, N, K, blocks, blocks_per_split,
    BLOCKS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    """out [M, N] = x [M, K] W^T, one tile of [BLOCK_N outputs, BLOCK_M tokens] a program.

    Weights are the left operand, so that they go from registers to the tensor cores; codes are laid out as
    `PackedCodes` says, scales and zeros [groups, N]. With SPLIT, program (., s) sums `blocks_per_split` blocks of
    inputs into part [s, M, N] float32, and the tile's last one adds them up in order; counter is what `split_counters`
    gives. BLOCKS_PER_GROUP 0: one group. UPCAST multiplies in float32, for the interpreter, which has no bfloat16
    product.
    """
    start_early(EARLY)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid, split = tl.program_id(0), tl.program_id(1)
    first_n, first_m = (pid % tiles_n) * BLOCK_N, (pid // tiles_n) * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    n_in, m_in = n < N, m < M

    BYTES: tl.constexpr = BLOCK_K * WIDTH // 8
    j = tl.arange(0, BYTES)
    # Instead of a mask: a tile of 128 outputs may have no second strip of 64, and reads the last output's codes for it.
    there = tl.minimum(n, N - 1)
    row = (there // 64).to(tl.int64) * blocks * 64 + there % 64
    code_at = code_ptr + row[:, None] * BYTES + j[None, :]
    x_at = x_ptr + m[None, :].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = split * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, blocks)):
        packed = tl.load(code_at + block * (64 * BYTES))
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
            inside = m_in[None, :]
            if not EVEN_K:
                inside = inside & (columns < K)[:, None]
            x = tl.load(x_at + columns[:, None], mask=inside, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            sums = tl.dot(unpacked(packed, zero, x.dtype, part, WIDTH), x, sums, input_precision="ieee")
        acc += sums * scale[:, None]

    at = m[None, :].to(tl.int64) * N + n[:, None]
    inside = n_in[:, None] & m_in[None, :]
    if SPLIT:
        tl.store(part_ptr + split.to(tl.int64) * M * N + at, acc, mask=inside)
        if not arrived_last(counter_ptr + pid, tl.num_programs(1)):
            return
        acc = sum_parts(part_ptr + at, M * N, tl.num_programs(1), inside, BLOCK_N, BLOCK_M)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    code_ptr, scale_ptr, zero_ptr, out_ptr,
    N, K, blocks, scale_row, code_stride, scale_stride, zero_stride, out_stride,
    BLOCKS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    """out [E, N, K] of 16 bits: one block of inputs of 64 outputs a program, each weight rounded once.

    Codes as `w4a16_kernel` has them, scales and zeros [groups, N] in rows `scale_row` apart, matrices a stride apart.
    """
    block, strip, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, 64)
    n = strip * 64 + row
    n_in = n < N

    BYTES: tl.constexpr = BLOCK_K * WIDTH // 8
    j = tl.arange(0, BYTES)
    first = matrix * code_stride + (strip.to(tl.int64) * blocks + block) * (64 * BYTES)
    packed = tl.load(code_ptr + first + row[:, None] * BYTES + j[None, :])
    group = 0
    if BLOCKS_PER_GROUP > 0:
        group = block // BLOCKS_PER_GROUP
    scale = tl.load(scale_ptr + matrix * scale_stride + group * scale_row + n, mask=n_in, other=0.0).to(tl.float32)
    zero = tl.zeros((64,), tl.int8) + ZERO
    if HAS_ZEROS:
        zero = tl.load(zero_ptr + matrix * zero_stride + group * scale_row + n, mask=n_in, other=0)
    start_early(EARLY)  # what is written to may still be read
    out_at = out_ptr + matrix * out_stride + n[:, None].to(tl.int64) * K
    for part in tl.static_range(8 // WIDTH):
        weights = unpacked(packed, zero, tl.float32, part, WIDTH) * scale[:, None]
        column = block * BLOCK_K + part * BYTES + j
        tl.store(out_at + column[None, :], weights.to(out_ptr.dtype.element_ty),
                 mask=n_in[:, None] & (column < K)[None, :])
