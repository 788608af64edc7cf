"""Triton: FP8 codes on devices whose Triton has no such type."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_values(codes):
    """E4M3 codes, as int8 -> their values, exactly, in float16: the bits are moved to where float16 has them."""
    bits = (codes.to(tl.int16) << 7) & ~0x4000
    return bits.to(tl.float16, bitcast=True) * 256.0
