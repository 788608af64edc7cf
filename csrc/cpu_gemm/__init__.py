"""torch's own packed products on CPU, each for the schemes it computes without loss and faster than tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..matrix import QuantizedMatrix
from ..quantize import quantize
from ..select import LinearKernel, Problem
from ..tiles import TileKernel

# From this many rows on, dequantizing a tile costs less than int8pack's conversion of the weights for every row.
FEW_ROWS = 16
# Outputs packed at a time: a multiple of the 64 that lie together, few enough that their int32 codes need little room.
STRIP = 256


def _not_cpu(problem: Problem) -> str | None:
    return None if problem.device.type == "cpu" else f"runs on CPU, not on {problem.device.type}"


class CpuInt4Kernel(LinearKernel):
    """`_weight_int4pack_mm_for_cpu`: 4-bit codes with scales by group."""

    name: ClassVar[str] = "cpu_int4"
    priority: ClassVar[int] = 10
    GROUPS: ClassVar[tuple[int, ...]] = (32, 64, 128, 256)

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme, group = problem.scheme, problem.scheme.group or problem.columns
        if (reason := _not_cpu(problem)) is not None:
            return reason
        if scheme.code != "uint" or scheme.bits != 4 or scheme.activation is not None:
            return "multiplies 4-bit weights by inputs that are not quantized"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"its {str(problem.dtype).removeprefix('torch.')} path is scalar code, a third as fast as tiles"
        if scheme.zero_point and problem.dtype == torch.bfloat16:
            return "keeps zero points in bfloat16, which loses up to 1/512 of them"
        if group not in cls.GROUPS or problem.columns % group or not problem.even:
            return f"needs whole groups of {', '.join(map(str, cls.GROUPS))} inputs, not {group} of {problem.columns}"
        if problem.scale_rows:
            return "needs scales for each row"
        if problem.rows % 16:
            return f"needs a multiple of 16 outputs, not {problem.rows}"
        return None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        scales = matrix.scales.float().expand(matrix.rows, -1)
        zeros = torch.zeros_like(scales) if matrix.zeros is None else (8.0 - matrix.zeros.float()) * scales
        self.group = matrix.scheme.group or matrix.columns
        self.weights = {
            "codes": torch.cat([self._pack(matrix, start) for start in range(0, matrix.rows, STRIP)]),
            "scales": torch.stack([scales, zeros], dim=-1).transpose(0, 1).to(dtype).contiguous(),
        }
        if matrix.order is not None:
            self.weights["order"] = matrix.order

    @staticmethod
    def _pack(matrix: QuantizedMatrix, start: int) -> Tensor:
        codes = matrix.codes(start, min(start + STRIP, matrix.rows))
        if matrix.order is not None:
            codes = codes[:, matrix.order]
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if (order := self.weights.get("order")) is not None:
            x = x.index_select(-1, order)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weights["codes"], self.group,
                                                         self.weights["scales"])
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


class CpuInt8Kernel(TileKernel):
    """`_weight_int8pack_mm` for few rows, tiles of the same codes for many: 8-bit weights with one scale a row."""

    name: ClassVar[str] = "cpu_int8"
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme = problem.scheme
        if (reason := _not_cpu(problem)) is not None:
            return reason
        if scheme.bits != 8 or scheme.code not in ("uint", "int8") or scheme.activation is not None:
            return "multiplies 8-bit integer weights by inputs that are not quantized"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"its {str(problem.dtype).removeprefix('torch.')} path is scalar code, a third as fast as tiles"
        if scheme.zero_point or (scheme.group or problem.columns) < problem.columns or problem.scale_rows:
            return "needs one scale for each row and no zero points"
        if problem.columns % 16:  # torch reads past the end of a row: wrong sums, or a segmentation fault
            return f"needs a multiple of 16 inputs, not {problem.columns}"
        return None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        if matrix.scheme.code == "uint":
            codes = matrix.codes
            matrix = replace(matrix, scheme=replace(matrix.scheme, code="int8"),
                             codes=lambda start, stop: (codes(start, stop) ^ 0x80).view(torch.int8))
        super().__init__(replace(matrix, groups=None), dtype)
        self.weights |= {"row_scales": matrix.scales.to(dtype).expand(matrix.rows, 1).flatten().contiguous()}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if not 0 < len(rows) < FEW_ROWS:
            return super().__call__(x, bias)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.planes[0], self.weights["row_scales"])
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


class CpuInt8Int8Kernel(LinearKernel):
    """`_int_mm`: 8-bit weights times 8-bit inputs, summed exactly in int32, scaled once."""

    name: ClassVar[str] = "cpu_int8_int8"
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme = problem.scheme
        if (reason := _not_cpu(problem)) is not None:
            return reason
        if scheme.code != "int8" or scheme.activation is None or scheme.activation.dtype != "int8":
            return "multiplies int8 weights by int8 inputs"
        if scheme.group is not None or scheme.activation.group is not None or problem.scale_rows:
            return "needs one scale for each row of the weight and each row of the input"
        if problem.columns * 128 * 128 >= 2**31:
            return f"sums of {problem.columns} products may not fit int32"
        if problem.columns == 1:
            return "torch's int8 product of a single input is wrong"
        return None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        assert matrix.scheme.activation is not None
        self.activation = matrix.scheme.activation
        self.weights = {"codes": matrix.codes(0, matrix.rows).contiguous(),
                        "scales": matrix.scales.float().expand(matrix.rows, 1).flatten()}
        if matrix.input_scale is not None:
            self.weights["input_scale"] = matrix.input_scale

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        codes, scale = quantize(x.reshape(-1, x.shape[-1]), self.activation, self.weights.get("input_scale"))
        sums = torch._int_mm(codes, self.weights["codes"].t())
        out = sums.float().mul_(scale).mul_(self.weights["scales"])
        if bias is not None:
            out += bias
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])
