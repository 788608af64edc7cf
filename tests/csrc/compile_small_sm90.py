"""Compile the kernels between products at real shapes for sm_90, without a GPU; prints the name of each that spills,
or does not wait for the kernel before it.

Run as a program of its own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nybble.csrc.attention import triton_latent
from nybble.csrc.moe_gemm import triton_rows
from nybble.csrc.moe_route import triton_kernel, triton_route
from nybble.csrc.norm_rope import triton_norm
from nybble.csrc.quantize import code_settings
from nybble.csrc.scheme import Activation

TYPES = {"scale_ptr": "*fp32", "static_ptr": "*fp32", "logit_ptr": "*fp32", "bias_ptr": "*fp32", "expert_ptr": "*i64",
         "row_ptr": "*i32", "slot_ptr": "*i64", "position_ptr": "*i64", "cache_ptr": "*bf16"}
ROUNDINGS = {None: None, "token": Activation(dtype="fp8_e4m3", scale="token"),
             "group": Activation(dtype="fp8_e4m3", scale="group", group=128),
             "int8": Activation(dtype="int8", scale="token")}


def ptx(kernel, constants, pointers=None, warps=4, stages=3):
    pointers, names, constants = {**TYPES, **(pointers or {})}, kernel.arg_names, {**constants, "EARLY": True}
    types = {name: "constexpr" if name in constants else pointers.get(name, "*bf16") if name.endswith("_ptr")
             else "fp32" if name in ("eps", "scale", "kv_scale") else "i32" for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items()
               if kind.startswith("*") or name in ("D", "H", "K", "x_row", "residual_row")}
    source = ASTSource(fn=kernel, signature=types, attrs=aligned,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "num_stages": stages}
    return build(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def between(kernel, activation, width, warps, **more):
    group = width if activation is None or activation.group is None else activation.group
    block = 1 << (group - 1).bit_length()
    codes = {} if activation is None else {"out_ptr": "*i8" if activation.dtype == "int8" else "*fp8e4nv"}
    constants = dict(QUANTIZE=activation is not None, ROWS=-(-width // group), BLOCK=block, GROUP=group,
                     **code_settings(activation), **more)
    return ptx(kernel, constants, codes, warps)


def route(experts, groups=1, top_groups=1, **more):
    size = experts // groups
    constants = dict(SPLITS=8, E=experts, GROUPS=groups, TOP_GROUPS=top_groups, TOP2=False, TOP_K=8, SOFTMAX=True,
                     RENORMALIZE=True, HAS_BIAS=False, TINY=1e-20, G_PAD=groups, S_PAD=1 << (size - 1).bit_length(),
                     K_PAD=8)
    return ptx(triton_route.route_kernel, {**constants, **more}, {"weight_ptr": "*fp32"}, warps=1)


def main() -> None:
    built = {}
    for name, activation in ROUNDINGS.items():
        built[f"norm {name}"] = between(triton_norm.rms_norm_kernel, activation, 4096, 8, HAS_RESIDUAL=True)
        built[f"wide norm {name}"] = between(triton_norm.rms_norm_kernel, activation, 8192, 16, HAS_RESIDUAL=True)
        width = 1024 if activation is None or activation.group else 14336
        built[f"silu {name}"] = between(triton_norm.silu_mul_kernel, activation, width, 2 if width == 1024 else 16)
    for block in ((16, 16), (64, 64)):
        built[f"logits {block}"] = text = ptx(
            triton_route.logits_kernel,
            dict(PER_SPLIT=512, UPCAST=False, BLOCK_T=block[0], BLOCK_E=block[1], BLOCK_H=128),
            {"out_ptr": "*fp32"})
        if "cp.async" not in text:
            print("logits are not pipelined", block)
    built["route 8"] = route(8)
    built["route 256"] = route(256, 8, 4, TOP2=True, SOFTMAX=False, HAS_BIAS=True)
    sums = {"weight_ptr": "*fp32"}
    for rounding, activation in ROUNDINGS.items():
        group = 128 if rounding == "group" else 512
        built[f"latent {rounding}"] = ptx(
            triton_latent.latent_cache_kernel,
            dict(HEADS=16, N=128, R=64, C=512, INTERLEAVED=True, QUANTIZE=activation is not None, FP8=False,
                 FINITE=3.3895313892515355e38, ROWS=512 // group, BLOCK=group, GROUP=group, HALF_PAD=32, BLOCK_H=16,
                 **code_settings(activation)))
    built["combine"] = ptx(triton_kernel.combine_kernel, dict(TOP_K=8, HAS_BESIDE=True, BLOCK=1024), sums)
    built["add rows"] = ptx(triton_rows.add_rows_kernel, dict(TOP_K=8, HAS_BESIDE=True, BLOCK=1024), sums)
    for name, text in built.items():
        if ".local" in text or "griddepcontrol.wait" not in text:
            print(name)


if __name__ == "__main__":
    main()
