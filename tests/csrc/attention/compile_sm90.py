"""Compile the attention kernels at real shapes for sm_90, without a GPU; prints the name of each that is not pipelined,
or does not wait for the kernel before it.

Run as a program of its own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nybble.csrc.attention import triton_decode, triton_mla, triton_paged
from nybble.csrc.attention.paged import LATENT, MIN_SHARE, TILES, _padded

FLOATS = ("qk_scale", "k_scale", "v_scale", "eps")
ODD = ("requests", "heads", "table_stride")  # not multiples of 16, nor are they one
ONE_LAUNCH = {"slot_ptr": "*i64"}
PARTS = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "counter_ptr": "*i32"}


def ptx(kernel, tile, constants, pointers):
    constants = {"IN_PARTS": False, "MIN_SHARE": MIN_SHARE, "EARLY": True,
                 "UPCAST": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
                 "BLOCK_Q": tile.m // constants["GROUP"], **constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in constants else "fp32" if name in FLOATS else pointers.get(name, "*bf16")
             if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {name: "*i32" for name in types if name.startswith(("query_start", "key_start", "seq_len", "table_ptr"))}
    index = kernel.arg_names.index
    aligned = {(index(name),): [["tt.divisibility", 16]] for name in types
               if name not in constants and name not in FLOATS + ODD}
    source = ASTSource(fn=kernel, signature=types, constexprs={(index(name),): v for name, v in constants.items()},
                       attrs=aligned)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    return build(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def paged(tile, group, width, tail=0, value=None, page=16, cache="*bf16", **more):
    value = value or width
    constants = dict(GROUP=group, D=width, D_TAIL=tail, D_V=value, D_PAD=_padded(width), TAIL_PAD=_padded(tail),
                     V_PAD=_padded(value), PAGE=page, WINDOW=0, ONE_QUERY=tile is TILES[0], **more)
    pointers = {"k_ptr": cache, "k_tail_ptr": cache, "v_ptr": cache, **(PARTS if "IN_PARTS" in more else {})}
    return ptx(triton_paged.attention_kernel, tile, constants, pointers)


def in_one_launch(group, width, cache="*bf16", **more):
    constants = dict(GROUP=group, KV_HEADS=8, D=width, D_PAD=_padded(width), PAGE=16, WINDOW=0, HAS_NORM=False,
                     FP8=cache != "*bf16", **more)
    pointers = {"k_ptr": cache, "v_ptr": cache, **ONE_LAUNCH, **(PARTS if "IN_PARTS" in more else {})}
    return ptx(triton_decode.decode_kernel, TILES[0], constants, pointers)


def latent(tile, group, **more):
    constants = dict(GROUP=group, C=512, R=64, C_PAD=512, R_PAD=64, PAGE=64, ONE_QUERY=tile is LATENT[0], **more)
    return ptx(triton_mla.latent_attention_kernel, tile, constants, PARTS)


def main() -> None:
    built = {
        "decode": paged(TILES[0], 4, 128), "decode in splits": paged(TILES[0], 4, 64, IN_PARTS=True),
        "decode, fp8": paged(TILES[0], 4, 128, cache="*fp8e4nv"),
        "one launch": in_one_launch(4, 128), "one launch in splits": in_one_launch(4, 128, IN_PARTS=True),
        "one launch, fp8": in_one_launch(7, 128, "*fp8e4nv", IN_PARTS=True),
        "prompt": paged(TILES[2], 4, 128), "prompt of 64": paged(TILES[2], 4, 64),
        "expanded": paged(TILES[2], 1, 128, 64, 128, page=0),
        "latent decode": latent(LATENT[0], 16, IN_PARTS=True), "latent chunk": latent(LATENT[1], 16, IN_PARTS=True),
    }
    for name, text in built.items():
        if text.count("cp.async.c") < 8 or ".local" in text or "griddepcontrol.wait" not in text:
            print(name, text.count("cp.async.c"))


if __name__ == "__main__":
    main()
