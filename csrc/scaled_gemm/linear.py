"""TritonScaledKernel: FP8 and int8 weights on CUDA, by 8-bit inputs where the scheme says so, else by 16-bit ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import (
    Tile,
    early,
    lacks_fp8,
    missing,
    multiprocessors,
    split_blocks,
    split_counters,
    split_parts,
    tile_for,
)
from ..matrix import QuantizedMatrix
from ..quantize import Quantized, Rounding, triton_quantize
from ..select import LinearKernel, Problem

MAX_BLOCK = 128
MIN_BLOCK = 32

# Measured on an H100 at Llama-3-8B's shapes: few tokens want small programs, many a tile that is read often.
TILES = (Tile(n=64, m=16, warps=4, stages=3), Tile(n=64, m=64, warps=4, stages=4), Tile(n=64, m=128, warps=4, stages=4),
         Tile(n=128, m=128, warps=8, stages=4))
# Programs for each multiprocessor: enough loads in flight to hide memory's latency.
WAVES = 2


def tiles_within(memory: int, block: int, itemsize: int) -> tuple[Tile, ...]:
    """TILES, with fewer stages where they would need more bytes of shared memory than `memory`: consumer devices have
    less than half of an H100's. Each stage but one holds `block` weights of 8 bits and inputs of `itemsize` bytes."""
    return tuple(replace(tile, stages=max(1, min(tile.stages, 1 + memory // (block * (tile.n + tile.m * itemsize)))))
                 for tile in TILES)


class _ScaledKernel(LinearKernel):
    """8-bit codes [N, K] with scales by tensor, row, group or block, as the checkpoint has them."""

    quantizes: ClassVar[bool]

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        scheme, (self.rows, self.columns) = matrix.scheme, (matrix.rows, matrix.columns)
        self.activation = scheme.activation if self.quantizes else None
        groups = [group for group in (scheme.group, self.activation and self.activation.group) if group]
        self.block = math.gcd(MAX_BLOCK, *groups)
        self.w_group, self.x_group = (
            (group or 0) // self.block for group in (scheme.group, self.activation and self.activation.group))
        codes = torch.nn.functional.pad(matrix.codes(0, matrix.rows).view(torch.uint8),
                                        (0, -matrix.columns % self.block)).view(matrix.codes(0, 0).dtype)
        scales = matrix.scales.float()
        if matrix.scale_rows is None:
            scales = scales.expand(matrix.rows, -1)
        self.fp8_bits = scheme.code == "fp8_e4m3" and lacks_fp8(codes.device)
        if self.fp8_bits:
            codes = codes.view(torch.int8)
        self.weights = {"codes": codes.contiguous(), "scales": scales.contiguous()}
        if matrix.scale_rows is not None:
            self.weights["scale_rows"] = matrix.scale_rows.int()
        if self.activation is not None and matrix.input_scale is not None:
            self.weights["input_scale"] = matrix.input_scale.float()
        if self.activation is not None:
            self.rounding = Rounding(self.activation, self.weights.get("input_scale"))
        self.programs = WAVES * multiprocessors(codes.device)
        self.counters = split_counters(self.programs, codes.device)
        self.tiles: tuple[Tile, ...] = TILES
        if codes.is_cuda:
            # CUDA keeps 1 KiB of a multiprocessor's for itself; one program may have the rest.
            memory = torch.cuda.get_device_properties(codes.device).shared_memory_per_multiprocessor - 1024
            self.tiles = tiles_within(memory, self.block, 1 if self.activation is not None else dtype.itemsize)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, self.columns).contiguous()
        if self.activation is None:
            out = self._run(rows, None, x.dtype, bias)
        else:
            codes, scales = triton_quantize(rows, self.activation, self.weights.get("input_scale"))
            out = self._run(codes, scales, x.dtype, bias)
        return out.view(*x.shape[:-1], self.rows)

    def run_rounded(self, x: Quantized, bias: Tensor | None = None) -> Tensor:
        return self._run(x.codes, x.scales, x.dtype, bias)

    def _run(self, rows: Tensor, x_scales: Tensor | None, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """rows [M, K] of values, or of codes with their scales -> [M, N] in `dtype`."""
        from .triton_kernel import scaled_kernel

        tokens, weights = len(rows), self.weights
        out = rows.new_empty(tokens, self.rows, dtype=dtype)
        if tokens == 0:
            return out
        codes, scales = weights["codes"], weights["scales"]
        x_scales = scales if x_scales is None else x_scales
        tile, blocks = tile_for(tokens, self.tiles), codes.shape[1] // self.block
        tiles = -(-self.rows // tile.n) * -(-tokens // tile.m)
        splits = split_blocks(tiles, blocks, self.programs)
        scaled_kernel[(tiles, splits)](
            rows, codes, x_scales, scales, weights.get("scale_rows", scales), scales if bias is None else bias, out,
            split_parts(out, splits), self.counters, tokens, self.rows, self.columns, codes.shape[1], blocks,
            -(-blocks // splits), x_scales.shape[1], scales.shape[1],
            W_GROUP=self.w_group, X_GROUP=self.x_group, X_SCALED=self.activation is not None,
            HAS_ROWS="scale_rows" in weights, HAS_BIAS=bias is not None, SPLIT=splits > 1,
            EVEN_K=self.columns == codes.shape[1], UPCAST=rows.device.type == "cpu", FP8_BITS=self.fp8_bits,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.block, num_warps=tile.warps, num_stages=tile.stages,
            **early(rows.device),
        )
        return out


def _refusal(problem: Problem, needed: tuple[int, int]) -> str | None:
    """What both kernels need."""
    scheme, device = problem.scheme, problem.device
    if (reason := missing(device, needed)) is not None:
        return reason
    if scheme.code not in ("fp8_e4m3", "int8"):
        return "multiplies fp8_e4m3 or int8 codes"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"gives 16-bit outputs, not {str(problem.dtype).removeprefix('torch.')}"
    if scheme.act_order or not problem.even:
        return "inputs must be in order"
    groups = [group for group in (scheme.group, scheme.activation and scheme.activation.group) if group]
    if math.gcd(MAX_BLOCK, *groups) < MIN_BLOCK:
        return f"needs groups of a multiple of {MIN_BLOCK} inputs, not {groups}"
    return None


class TritonScaledKernel(_ScaledKernel):
    """8-bit weights by inputs rounded to 8 bits: static or per token or per group."""

    name: ClassVar[str] = "triton_w8a8"
    priority: ClassVar[int] = 10
    quantizes: ClassVar[bool] = True

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme = problem.scheme
        fp8 = scheme.code == "fp8_e4m3"
        if (reason := _refusal(problem, (8, 9) if fp8 else (8, 0))) is not None:
            return reason
        if scheme.activation is None or scheme.activation.dtype != scheme.code:
            return f"multiplies {scheme.code} weights by {scheme.code} inputs"
        return None


class TritonWeightOnlyKernel(_ScaledKernel):
    """8-bit weights by 16-bit inputs: weight-only formats, and any FP8 one where the device has no FP8 product."""

    name: ClassVar[str] = "triton_w8a16"
    priority: ClassVar[int] = 5
    quantizes: ClassVar[bool] = False

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        return _refusal(problem, (8, 0))
