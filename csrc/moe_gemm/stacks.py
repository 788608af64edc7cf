"""Stacks: one matrix of every expert side by side, in the layout that a kernel reads; filled expert by expert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..launch import Tile, lacks_fp8
from ..matrix import QuantizedMatrix
from ..moe_route import Layout
from ..quantize import triton_quantize
from ..scheme import Activation, Scheme
from ..w4a16_gemm import few_rows_op
from ..w4a16_gemm.packing import PackedCodes

PLAIN_BLOCK, MAX_BLOCK = 64, 128
FEW_SLOTS = 16
"""Slots of a tile that the compiled kernel for 4 bits takes."""


class Stack(ABC):
    """The matrices [N, K] of `count` experts. `tensors` is all that it keeps."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tensors: dict[str, Tensor] = {}

    def _put(self, number: int, parts: Mapping[str, Tensor]) -> None:
        """Place one expert's tensors; the first one decides the shapes."""
        for name, part in parts.items():
            if name not in self.tensors:
                self.tensors[name] = part.new_empty(self.count, *part.shape)
            self.tensors[name][number] = part

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @abstractmethod
    def run(self, x: Tensor, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int, up: Stack | None) -> None:
        """out [slots, N] = x[slot // rows_per_slot] W_e^T for every slot in `layout`; with `up`, a stack of the same
        kind, silu of that times the same product with `up`."""


class CodedStack(Stack):
    """Plain 16-bit, FP8 or int8 weights [E, N, K], K padded to whole blocks; scales as `QuantizedMatrix` has them.

    Args:
        activation: how inputs are rounded; None multiplies them as they are.
    """

    def __init__(self, count: int, scheme: Scheme | None, activation: Activation | None) -> None:
        super().__init__(count)
        self.plain, self.activation = scheme is None, activation
        sizes = [group for group in (scheme and scheme.group, activation and activation.group) if group]
        self.block = PLAIN_BLOCK if scheme is None else math.gcd(MAX_BLOCK, *sizes)
        self.w_group = (scheme.group or 0) // self.block if scheme else 0
        self.x_group = (activation.group or 0) // self.block if activation else 0
        self.scale_rows: Tensor | None = None
        self.shape = (0, 0)

    @classmethod
    def over(cls, codes: Tensor, scales: Tensor, scheme: Scheme, activation: Activation) -> CodedStack:
        """A stack of matrices that already lie in memory: codes [E, N, K], experts any distance apart, K a multiple of
        32, and their rows' scales [E, N] float32."""
        stack = cls(len(codes), scheme, activation)
        stack.shape, stack.block = (codes.shape[1], codes.shape[2]), math.gcd(stack.block, codes.shape[2])
        stack.tensors = {"codes": codes, "scales": scales.unsqueeze(-1)}
        return stack

    def put_plain(self, number: int, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._put(number, {"codes": torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.block))})

    def put(self, number: int, matrix: QuantizedMatrix) -> None:
        self.shape = (matrix.rows, matrix.columns)
        codes = matrix.codes(0, matrix.rows)
        padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, -matrix.columns % self.block)).view(codes.dtype)
        scales = matrix.scales.float()
        if matrix.scale_rows is None:
            scales = scales.expand(matrix.rows, -1)
        else:
            self.scale_rows = matrix.scale_rows.int().contiguous()
        self._put(number, {"codes": padded, "scales": scales})

    def run(self, x: Tensor, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int, up: Stack | None) -> None:
        from .triton_kernel import coded_experts_kernel

        other = self if up is None else up
        assert isinstance(other, CodedStack)
        codes, (outputs, inputs) = self.tensors["codes"], self.shape
        x_scales = x
        if self.activation is not None:
            x, x_scales = triton_quantize(x, self.activation)
        up_codes = other.tensors["codes"]
        if fp8_bits := codes.dtype == torch.float8_e4m3fn and lacks_fp8(codes.device):
            codes, up_codes = codes.view(torch.int8), up_codes.view(torch.int8)
        scales, up_scales = self.tensors.get("scales", codes), other.tensors.get("scales", codes)
        rows = scales if self.scale_rows is None else self.scale_rows
        up_rows = scales if other.scale_rows is None else other.scale_rows
        coded_experts_kernel[(layout.max_tiles * -(-outputs // tile.n),)](
            x, x_scales, layout.slots, layout.tiles, out,
            codes, scales, rows, up_codes, up_scales, up_rows,
            layout.max_tiles, outputs, inputs, codes.shape[2], codes.stride(0), x_scales.shape[1], scales.shape[-1],
            scales.stride(0), up_scales.stride(0),
            GATED=up is not None, ROWS_PER_SLOT=rows_per_slot, KIND_PLAIN=self.plain,
            W_GROUP=self.w_group, X_GROUP=self.x_group, X_SCALED=self.activation is not None,
            HAS_ROWS=self.scale_rows is not None, UPCAST=x.device.type == "cpu", FP8_BITS=fp8_bits,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.block, num_warps=tile.warps, num_stages=tile.stages,
        )


class PackedStack(Stack):
    """Codes of 2 to 8 bits as `PackedCodes` lays them out, scales and zeros [E, groups, N], orders [E, K]."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.shape = (0, 0)

    def put(self, number: int, matrix: QuantizedMatrix) -> None:
        packed, group = PackedCodes.pack(matrix), matrix.scheme.group
        self.few_rows = None if matrix.scheme.act_order else few_rows_op("w4_experts", packed, matrix.columns)
        self.shape, self.width, self.block = (matrix.rows, matrix.columns), packed.width, packed.block
        self.zero = matrix.zero - packed.offset
        self.blocks_per_group = 0 if group is None else group // packed.block
        parts = {"codes": packed.bytes, "scales": matrix.scales.expand(matrix.rows, -1).T}
        if matrix.zeros is not None:
            parts["zeros"] = (matrix.zeros.expand(matrix.rows, -1).T ^ packed.offset).contiguous().view(torch.int8)
        if matrix.scheme.act_order:  # also for an expert that happens to be in order
            parts["order"] = torch.arange(matrix.columns, device=matrix.scales.device) if matrix.order is None \
                else matrix.order
            parts["order"] = parts["order"].int()
        self._put(number, parts)

    def run(self, x: Tensor, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int, up: Stack | None) -> None:
        from .triton_kernel import packed_experts_kernel

        other, (outputs, inputs) = (self if up is None else up).tensors, self.shape
        mine, codes = self.tensors, self.tensors["codes"]
        if self.few_rows is not None and tile.m == FEW_SLOTS:
            above = {} if up is None else up.tensors
            self.few_rows(out, x, layout.slots, layout.tiles, codes, mine["scales"], mine.get("zeros"),
                          above.get("codes"), above.get("scales"), above.get("zeros"), rows_per_slot,
                          self.blocks_per_group, self.zero)
            return
        packed_experts_kernel[(layout.max_tiles * -(-outputs // tile.n),)](
            x, layout.slots, layout.tiles, out,
            codes, mine["scales"], mine.get("zeros", codes), mine.get("order", codes),
            other["codes"], other["scales"], other.get("zeros", codes), other.get("order", codes),
            layout.max_tiles, outputs, inputs, codes.shape[2], codes[0].numel(), mine["scales"].shape[1],
            GATED=up is not None, ROWS_PER_SLOT=rows_per_slot, BLOCKS_PER_GROUP=self.blocks_per_group, WIDTH=self.width,
            ZERO=self.zero, HAS_ZEROS="zeros" in mine, HAS_ORDER="order" in mine, UPCAST=x.device.type == "cpu",
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.block, num_warps=tile.warps, num_stages=tile.stages,
        )
