"""Triton: programs that share a tile of outputs add up their parts without a launch of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrived_last(counter_ptr, parts):
    """Whether this program is the last of `parts` that count at `counter_ptr`: then all that they have stored can be
    read, by loads that pass the first-level cache by. The counter starts at 0 and is left there."""
    tl.debug_barrier()  # every thread of this program has stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_parts(part_ptr, stride, parts, inside, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of `parts` tiles [BLOCK_N, BLOCK_M] float32 that lie `stride` apart, in order."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(0, parts):
        total += tl.load(part_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        part_ptr += stride
    return total
