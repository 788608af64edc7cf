"""Triton: codes as the packed layout holds them, to 16-bit values less their zero points."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(packed, zero, dtype: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Codes number PART of bytes [N, B] int8, less zero [N] int8, in dtype: exact, since they are small integers.

    Four bits without a conversion: a code as the low byte under an exponent is that power of two plus the code.
    """
    MASK: tl.constexpr = (1 << WIDTH) - 1
    if WIDTH == 4 and dtype == tl.bfloat16:
        if PART == 0:
            raised = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $2, 0x0F0F0F0F; prmt.b32 $0, t, 0x43434343, 0x4140; "
                "prmt.b32 $1, t, 0x43434343, 0x4342; }", "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            raised = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; prmt.b32 $0, t, 0x43434343, 0x4140; "
                "prmt.b32 $1, t, 0x43434343, 0x4342; }", "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
        return raised - (zero.to(tl.float32) + 128.0).to(tl.bfloat16)[:, None]
    if WIDTH == 4 and dtype == tl.float16:
        if PART == 0:
            raised = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $2, 0x0F0F0F0F; prmt.b32 $0, t, 0x64646464, 0x4140; "
                "prmt.b32 $1, t, 0x64646464, 0x4342; }", "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
        else:
            raised = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; prmt.b32 $0, t, 0x64646464, 0x4140; "
                "prmt.b32 $1, t, 0x64646464, 0x4342; }", "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
        return raised - (zero.to(tl.float32) + 1024.0).to(tl.float16)[:, None]
    codes = packed
    if WIDTH < 8:
        codes = (packed >> (PART * WIDTH)) & MASK
    return codes.to(dtype) - zero.to(dtype)[:, None]
