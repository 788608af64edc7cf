"""Triton: codes as the packed layout holds them, to 16-bit values less their zero points."""

from __future__ import annotations

import triton
import triton.language as tl


def _raised(shift: int, exponent: int) -> tl.constexpr:
    """PTX that puts the codes of $2's bytes, `shift` bits up, under the upper bytes of 16-bit floats: $0 and $1."""
    codes = f"shr.u32 t, $2, {shift}; and.b32 t, t," if shift else "and.b32 t, $2,"
    upper = f"0x{exponent * 0x01010101:08X}"
    return tl.constexpr(f"{{ .reg .b32 t; {codes} 0x0F0F0F0F; prmt.b32 $0, t, {upper}, 0x4140; "
                        f"prmt.b32 $1, t, {upper}, 0x4342; }}")


# 128 and 1024, whose last bit is worth one.
BF16, FP16 = 0x43, 0x64
BF16_LOW, BF16_HIGH, FP16_LOW, FP16_HIGH = _raised(0, BF16), _raised(4, BF16), _raised(0, FP16), _raised(4, FP16)


@triton.jit
def unpacked(packed, zero, dtype: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """Codes number PART of bytes [N, B] int8, less zero [N] int8, in dtype: exact, since they are small integers.

    Four bits without a conversion: a code as the low byte under an exponent is that power of two plus the code.
    """
    if WIDTH == 4 and dtype == tl.bfloat16:
        raised = tl.inline_asm_elementwise(BF16_LOW if PART == 0 else BF16_HIGH, "=r,=r,r", [packed],
                                           dtype=tl.bfloat16, is_pure=True, pack=4)
        return raised - (zero.to(tl.float32) + 128.0).to(tl.bfloat16)[:, None]
    if WIDTH == 4 and dtype == tl.float16:
        raised = tl.inline_asm_elementwise(FP16_LOW if PART == 0 else FP16_HIGH, "=r,=r,r", [packed],
                                           dtype=tl.float16, is_pure=True, pack=4)
        return raised - (zero.to(tl.float32) + 1024.0).to(tl.float16)[:, None]
    codes = packed
    if WIDTH < 8:
        codes = (packed >> (PART * WIDTH)) & ((1 << WIDTH) - 1)
    return codes.to(dtype) - zero.to(dtype)[:, None]
