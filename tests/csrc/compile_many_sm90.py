"""Compile what feeds torch's products at real shapes for sm_90, without a GPU; prints the name of each that is slow.

Slow is what spills, or what stores less than 16 bytes a thread. Run as a program of its own: a process that interprets
kernels cannot compile them.
"""

from __future__ import annotations

import re

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nybble.csrc.moe_gemm import triton_rows
from nybble.csrc.w4a16_gemm import triton_kernel

TYPES = {"code_ptr": "*i8", "scale_ptr": "*fp16", "zero_ptr": "*i8", "expert_ptr": "*i64", "row_ptr": "*i32",
         "offset_ptr": "*i32", "order_ptr": "*i32"}
COUNTS = ("blocks", "first", "last")  # the others are multiples of 16 at real shapes


def ptx(kernel, warps, **constants):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") if name.endswith("_ptr") else "i32"
             for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items()
               if kind != "constexpr" and name not in COUNTS}
    source = ASTSource(fn=kernel, signature=types, attrs=aligned,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    return build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


def main() -> None:
    built = {}
    for width, block, zeros in ((4, 128, True), (4, 128, False), (8, 128, True), (2, 64, True)):
        built[f"dequantize {width} {zeros}"] = ptx(
            triton_kernel.dequantize_kernel, 4, BLOCKS_PER_GROUP=1, WIDTH=width, ZERO=8, HAS_ZEROS=zeros,
            BLOCK_K=block, EARLY=True)
    for order in (False, True):
        settings = dict(HAS_ORDER=order, BLOCK=4096, EARLY=True)
        built[f"scatter {order}"] = ptx(triton_rows.scatter_rows_kernel, 8, TOP_K=2, **settings)
        built[f"gated {order}"] = ptx(triton_rows.gated_rows_kernel, 8, **settings)
    built["place"] = ptx(triton_rows.place_rows_kernel, 8, BLOCK=4096, EARLY=True)
    for name, text in built.items():
        narrow = [store for store in re.findall(r"st\.global\S*", text) if "v4.b32" not in store]
        if ".local" in text or narrow or "st.global" not in text:
            print(name, *narrow)


if __name__ == "__main__":
    main()
