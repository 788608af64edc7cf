"""The Triton kernel that fills in tokens of the step before."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_early import start_early

BLOCK = 256


@triton.jit(do_not_specialize=["count"])
def take_pending_kernel(ids, sampled, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start_early(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    found = tl.load(ids + at, mask=inside, other=0)
    pending = inside & (found < 0)
    token = tl.load(sampled + (-1 - found), mask=pending, other=0)
    tl.store(ids + at, token, mask=pending)
