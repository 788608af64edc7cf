"""Triton: 16-bit inputs times codes of 2, 4 or 8 bits, unpacked in registers, summed and scaled in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_splits import arrived_last, sum_parts


@triton.jit
def w4a16_kernel(
    x_ptr, code_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    M, N, K, blocks, blocks_per_split,
    BLOCKS_PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out [M, N] = x [M, K] W^T, one tile of [BLOCK_N outputs, BLOCK_M tokens] a program.

    Weights are the left operand, so that they go from registers to the tensor cores; codes are laid out as
    `PackedCodes` says, scales and zeros [groups, N]. With SPLIT, program (., s) sums `blocks_per_split` blocks of
    inputs into part [s, M, N] float32, and the tile's last one adds them up in order; counter is what `split_counters`
    gives. BLOCKS_PER_GROUP 0: one group. UPCAST multiplies in float32, for the interpreter, which has no bfloat16
    product.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid, split = tl.program_id(0), tl.program_id(1)
    first_n, first_m = (pid % tiles_n) * BLOCK_N, (pid // tiles_n) * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    n_in, m_in = n < N, m < M

    BYTES: tl.constexpr = BLOCK_K * WIDTH // 8
    MASK: tl.constexpr = (1 << WIDTH) - 1
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
            codes = packed
            if WIDTH < 8:
                codes = (packed >> (part * WIDTH)) & MASK
            # Codes and zeros are integers up to 255 apart, which 16-bit floats hold exactly.
            if UPCAST:
                weights = codes.to(tl.float32) - zero.to(tl.float32)[:, None]
                sums = tl.dot(weights, x.to(tl.float32), sums, input_precision="ieee")
            else:
                weights = codes.to(x.dtype) - zero.to(x.dtype)[:, None]
                sums = tl.dot(weights, x, sums)
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
