"""TritonW4A16Kernel: weights of 2, 3, 4 or 8 bits by 16-bit inputs on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import Tile, early, missing, multiprocessors, split_blocks, split_counters, split_parts, tile_for
from ..matrix import QuantizedMatrix
from ..ops import optional_op
from ..select import LinearKernel, Problem
from . import mid_rows
from .many_rows import MANY_TOKENS, Format, multiply
from .packing import MAX_BLOCK, MIN_BLOCK, MOST_BLOCKS, PackedCodes, block_of

# Measured on an H100 at Llama-3-8B's shapes: few tokens want small programs, many a tile that is read often.
TILES = (Tile(n=64, m=16, warps=4, stages=3), Tile(n=64, m=32, warps=4, stages=4), Tile(n=64, m=64, warps=4, stages=4),
         Tile(n=128, m=128, warps=8, stages=3))
# Programs for each multiprocessor: enough loads in flight to hide memory's latency.
WAVES = 4
FEW_ROWS = 16
ALIGNMENT = 16  # bytes that a lane of the kernel for few tokens reads at once


class TritonW4A16Kernel(LinearKernel):
    """Codes with scales and zero points by group, inputs in any order; float32 sums, no atomics.

    4 bits by a few tokens, and on Hopper by some hundred, have compiled kernels of their own on the same weights
    (csrc/w4a16_gemm/few_rows.cu, mid_rows.cu), where they are built. From MANY_TOKENS on weights are dequantized first,
    rounded to the inputs' dtype, and torch multiplies.
    """

    name: ClassVar[str] = "triton_w4a16"
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme = problem.scheme
        if (reason := missing(problem.device, (8, 0))) is not None:
            return reason
        if scheme.code != "uint" or scheme.bits not in (2, 3, 4, 8) or scheme.activation is not None:
            return "multiplies unsigned codes of 2, 3, 4 or 8 bits by inputs that are not quantized"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"multiplies 16-bit inputs, not {str(problem.dtype).removeprefix('torch.')}"
        if block_of(scheme.group) < MIN_BLOCK:
            return f"needs groups of a multiple of {MIN_BLOCK} inputs, not {scheme.group}"
        if not problem.even:
            return "inputs are scattered over groups of unequal size"
        if problem.scale_rows:
            return "needs scales for each row"
        return None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        packed = PackedCodes.pack(matrix)
        self.rows, self.columns, self.blocks = matrix.rows, matrix.columns, packed.bytes.shape[1]
        self.form = Format.of(packed, matrix)
        self.programs = WAVES * multiprocessors(matrix.scales.device)
        self.counters = split_counters(self.programs, matrix.scales.device)
        self.weights = {"codes": packed.bytes, "scales": matrix.scales.expand(matrix.rows, -1).T.contiguous()}
        if matrix.zeros is not None:
            zeros = matrix.zeros.expand(matrix.rows, -1).T ^ packed.offset
            self.weights["zeros"] = zeros.view(torch.int8).contiguous()
        if matrix.order is not None:
            self.weights["order"] = matrix.order.int()
        self.few_rows = few_rows_op("w4_few_rows", packed, matrix.columns)
        self.mid_rows = mid_rows.mid_rows_op(packed, matrix.columns)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        from .triton_kernel import w4a16_kernel

        rows = x.reshape(-1, self.columns).contiguous()
        out = rows.new_empty(len(rows), self.rows)
        if len(rows) == 0:
            return out.view(*x.shape[:-1], self.rows)
        weights = self.weights
        if (order := weights.get("order")) is not None:
            rows = rows.index_select(1, order)  # once: gathered inside, every tile of outputs would do it again
        aligned = rows.data_ptr() % ALIGNMENT == 0
        if self.few_rows is not None and len(rows) <= FEW_ROWS and aligned:
            self.few_rows(out, rows, weights["codes"], weights["scales"], weights.get("zeros"), bias,
                          self.form.blocks_per_group, self.form.zero)
            return out.view(*x.shape[:-1], self.rows)
        op = self.mid_rows if aligned else None
        if op is not None and mid_rows.multiply(op, rows, weights, self.form, bias, out):
            return out.view(*x.shape[:-1], self.rows)
        if len(rows) >= MANY_TOKENS:
            multiply(rows, weights, self.form, bias, out)
            return out.view(*x.shape[:-1], self.rows)
        tile = tile_for(len(rows), TILES)
        tiles = -(-self.rows // tile.n) * -(-len(rows) // tile.m)
        splits = split_blocks(tiles, self.blocks, self.programs)
        codes = weights["codes"]
        w4a16_kernel[(tiles, splits)](
            rows, codes, weights["scales"], weights.get("zeros", codes), codes if bias is None else bias,
            out, split_parts(out, splits), self.counters,
            len(rows), self.rows, self.columns, self.blocks, -(-self.blocks // splits),
            BLOCKS_PER_GROUP=self.form.blocks_per_group, WIDTH=self.form.width, ZERO=self.form.zero,
            HAS_ZEROS="zeros" in weights, HAS_BIAS=bias is not None, SPLIT=splits > 1,
            EVEN_K=self.columns % self.form.block == 0, UPCAST=x.device.type == "cpu",
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.form.block, num_warps=tile.warps, num_stages=tile.stages,
            **early(x.device),
        )
        return out.view(*x.shape[:-1], self.rows)


def few_rows_op(name: str, packed: PackedCodes, columns: int) -> Callable[..., None] | None:
    """The compiled kernel for a few tokens, if it can multiply by these codes and is there; it needs mma of Ampere."""
    device = packed.bytes.device
    if (packed.width != 4 or packed.block != MAX_BLOCK or columns % 16 or packed.bytes.shape[-3] > MOST_BLOCKS
            or missing(device, (8, 0)) is not None):
        return None
    return optional_op(name, device)
