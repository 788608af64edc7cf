"""Stacks: one matrix of every expert side by side, in the layout that a kernel reads; filled expert by expert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..launch import Tile, early, lacks_fp8
from ..matrix import QuantizedMatrix
from ..moe_route import Layout
from ..quantize import Quantized, Rounding, triton_quantize
from ..scheme import Activation, Scheme
from ..w4a16_gemm import Format, PackedCodes, dequantize, few_rows_op

PLAIN_BLOCK, MAX_BLOCK = 64, 128
FEW_SLOTS = (8, 16)
"""Slots of a tile that the compiled kernel for 4 bits takes; Triton's products have 16 at least."""
# Rows an expert has on average from which torch's grouped product is faster than the kernels here. Measured on an H100,
# ms a layer of Mixtral by them and by it: 4 bits 2.56 and 3.01 at 256 rows, 4.72 and 3.73 at 512; 16 bits 1.29 and 1.67
# at 128, 2.22 and 1.60 at 256.
PACKED_FROM, PLAIN_FROM = 352, 160


class Stack(ABC):
    """The matrices [N, K] of `count` experts. `tensors` is all that it keeps.

    Attributes:
        shape: (N, K).
        dense_from: rows an expert from which its weights in 16 bits are better; None where `dense` cannot give them.
        dense_size: values of an expert that `dense` must write.
        rounding: how `run` takes inputs that were rounded before; None: not at all.
        small_tiles: whether `run` takes tiles of 8 slots, too.
    """

    shape: tuple[int, int]
    rounding: Rounding | None = None
    small_tiles: bool = False
    dense_from: int | None = None
    dense_size: int = 0

    def __init__(self, count: int) -> None:
        self.count, self.shape = count, (0, 0)
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
    def run(self, x: Tensor | Quantized, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int,
            up: Stack | None) -> None:
        """out [slots, N] = x[slot // rows_per_slot] W_e^T for every slot in `layout`; with `up`, a stack of the same
        kind, silu of that times the same product with `up`."""

    def dense(self, first: int, last: int, scratch: Tensor) -> Tensor:
        """The matrices [last - first, N, K] of experts [first, last) in scratch's 16-bit dtype, inputs in stored order;
        in `scratch`, of `dense_size` values an expert, where they are not kept like that."""
        raise NotImplementedError(f"{type(self).__name__} has dense_from None")


class CodedStack(Stack):
    """Plain 16-bit, FP8 or int8 weights [E, N, K], K padded to whole blocks; scales as `QuantizedMatrix` has them.

    Args:
        activation: how inputs are rounded; None multiplies them as they are.
    """

    def __init__(self, count: int, scheme: Scheme | None, activation: Activation | None) -> None:
        super().__init__(count)
        self.plain, self.activation = scheme is None, activation
        self.rounding = None if activation is None else Rounding(activation)
        self.dense_from = PLAIN_FROM if self.plain else None
        sizes = [group for group in (scheme and scheme.group, activation and activation.group) if group]
        self.block = PLAIN_BLOCK if scheme is None else math.gcd(MAX_BLOCK, *sizes)
        self.w_group = (scheme.group or 0) // self.block if scheme else 0
        self.x_group = (activation.group or 0) // self.block if activation else 0
        self.scale_rows: Tensor | None = None

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

    def run(self, x: Tensor | Quantized, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int,
            up: Stack | None) -> None:
        from .triton_kernel import coded_experts_kernel

        other = self if up is None else up
        assert isinstance(other, CodedStack)
        codes, (outputs, inputs) = self.tensors["codes"], self.shape
        if isinstance(x, Quantized):
            rows_in, x_scales = x.codes, x.scales
        elif self.activation is not None:
            rows_in, x_scales = triton_quantize(x, self.activation)
        else:
            rows_in, x_scales = x, x
        up_codes = other.tensors["codes"]
        if fp8_bits := codes.dtype == torch.float8_e4m3fn and lacks_fp8(codes.device):
            codes, up_codes = codes.view(torch.int8), up_codes.view(torch.int8)
        scales, up_scales = self.tensors.get("scales", codes), other.tensors.get("scales", codes)
        rows = scales if self.scale_rows is None else self.scale_rows
        up_rows = scales if other.scale_rows is None else other.scale_rows
        coded_experts_kernel[(layout.max_tiles * -(-outputs // tile.n),)](
            rows_in, x_scales, layout.slots, layout.tiles, out,
            codes, scales, rows, up_codes, up_scales, up_rows,
            layout.max_tiles, outputs, inputs, codes.shape[2], codes.stride(0), x_scales.shape[1], scales.shape[-1],
            scales.stride(0), up_scales.stride(0),
            GATED=up is not None, ROWS_PER_SLOT=rows_per_slot, KIND_PLAIN=self.plain,
            W_GROUP=self.w_group, X_GROUP=self.x_group, X_SCALED=self.activation is not None,
            HAS_ROWS=self.scale_rows is not None, UPCAST=out.device.type == "cpu", FP8_BITS=fp8_bits,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.block, num_warps=tile.warps, num_stages=tile.stages,
            **early(out.device),
        )

    def dense(self, first: int, last: int, scratch: Tensor) -> Tensor:
        return self.tensors["codes"][first:last, :, : self.shape[1]]


class PackedStack(Stack):
    """Codes of 2 to 8 bits as `PackedCodes` lays them out, scales and zeros [E, groups, N], orders [E, K]."""

    dense_from = PACKED_FROM
    few_rows: Callable[..., None] | None = None

    def put(self, number: int, matrix: QuantizedMatrix) -> None:
        packed = PackedCodes.pack(matrix)
        self.few_rows = None if matrix.scheme.act_order else few_rows_op("w4_experts", packed, matrix.columns)
        self.small_tiles = self.few_rows is not None
        self.shape, self.form = (matrix.rows, matrix.columns), Format.of(packed, matrix)
        self.dense_size = matrix.rows * matrix.columns
        parts = {"codes": packed.bytes, "scales": matrix.scales.expand(matrix.rows, -1).T}
        if matrix.zeros is not None:
            parts["zeros"] = (matrix.zeros.expand(matrix.rows, -1).T ^ packed.offset).contiguous().view(torch.int8)
        if matrix.scheme.act_order:  # also for an expert that happens to be in order
            parts["order"] = torch.arange(matrix.columns, device=matrix.scales.device) if matrix.order is None \
                else matrix.order
            parts["order"] = parts["order"].int()
        self._put(number, parts)

    def run(self, x: Tensor | Quantized, layout: Layout, out: Tensor, tile: Tile, *, rows_per_slot: int,
            up: Stack | None) -> None:
        from .triton_kernel import packed_experts_kernel

        assert isinstance(x, Tensor)
        other, (outputs, inputs) = (self if up is None else up).tensors, self.shape
        mine, codes = self.tensors, self.tensors["codes"]
        if self.few_rows is not None and tile.m in FEW_SLOTS:
            above = {} if up is None else up.tensors
            self.few_rows(out, x, layout.slots, layout.tiles, codes, mine["scales"], mine.get("zeros"),
                          above.get("codes"), above.get("scales"), above.get("zeros"), layout.most, rows_per_slot,
                          self.form.blocks_per_group, self.form.zero)
            return
        packed_experts_kernel[(layout.max_tiles * -(-outputs // tile.n),)](
            x, layout.slots, layout.tiles, out,
            codes, mine["scales"], mine.get("zeros", codes), mine.get("order", codes),
            other["codes"], other["scales"], other.get("zeros", codes), other.get("order", codes),
            layout.max_tiles, outputs, inputs, codes.shape[2], codes[0].numel(), mine["scales"].shape[1],
            GATED=up is not None, ROWS_PER_SLOT=rows_per_slot, BLOCKS_PER_GROUP=self.form.blocks_per_group,
            WIDTH=self.form.width, ZERO=self.form.zero, HAS_ZEROS="zeros" in mine, HAS_ORDER="order" in mine,
            UPCAST=x.device.type == "cpu", BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=self.form.block,
            num_warps=tile.warps, num_stages=tile.stages, **early(x.device),
        )

    def dense(self, first: int, last: int, scratch: Tensor) -> Tensor:
        mine, part = self.tensors, slice(first, last)
        out = scratch[: (last - first) * self.dense_size].view(last - first, *self.shape)
        return dequantize(mine["codes"][part], mine["scales"][part], mine["zeros"][part] if "zeros" in mine else None,
                          out, self.form)
