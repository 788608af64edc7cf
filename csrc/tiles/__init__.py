"""The kernel for every scheme and device: some rows at a time are dequantized in the cache and multiplied by torch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..matrix import QuantizedMatrix
from ..quantize import fake_quantize
from ..select import LinearKernel, Problem
from .packing import PLANES, pack, unpack

__all__ = ["TileKernel", "pack", "unpack"]

# Weights dequantized at a time: 2 MiB in float32. On EPYC cores tiles of an eighth of it cost twice as much, in calls.
TILE = 2**19


class TileKernel(LinearKernel):
    """Codes stay packed: 2, 3 and 4 bits exactly so, 8-bit ones as they are."""

    name: ClassVar[str] = "tiles"
    priority: ClassVar[int] = -10

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        scheme = problem.scheme
        if scheme.code not in ("uint", "int8", "fp8_e4m3") or scheme.bits not in PLANES:
            return f"codes {scheme.code} of {scheme.bits} bits are not uint of 2, 3, 4 or 8, int8 or fp8_e4m3"
        if not problem.even:
            return "inputs are scattered over groups of unequal size"
        return None

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        self.scheme, self.zero, self.columns = matrix.scheme, matrix.zero, matrix.columns
        self.rows_at_once = max(16, TILE // max(1, self.columns))
        self.starts = range(0, matrix.rows, self.rows_at_once)
        self.shape = matrix.rows, matrix.columns
        stored = {"scales": matrix.scales.contiguous(), "zeros": matrix.zeros, "scale_rows": matrix.scale_rows,
                  "order": matrix.order, "input_scale": matrix.input_scale}
        self.weights: dict[str, Tensor] = {name: tensor for name, tensor in stored.items() if tensor is not None}
        self.planes = self._pack(matrix)
        self.weights |= {f"codes{i}": plane for i, plane in enumerate(self.planes)}
        if self.scheme.code == "fp8_e4m3":
            self.weights["scales"] = self.weights["scales"].float() * 2**8  # `_fp8` gives values 2^8 too small

    def _pack(self, matrix: QuantizedMatrix) -> list[Tensor]:
        tiles: list[list[Tensor]] = []
        for start in self.starts:
            codes = matrix.codes(start, min(start + self.rows_at_once, matrix.rows))
            if matrix.order is not None:
                codes = codes[:, matrix.order]
            tiles.append(pack(codes, self.scheme.bits) if self.scheme.code == "uint" else [codes])
        return [torch.cat(plane) for plane in zip(*tiles)]

    def dequant(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32, their columns in `order`."""
        planes = [plane[start:stop] for plane in self.planes]
        if self.scheme.code == "fp8_e4m3":
            values = _fp8(planes[0])
        elif self.scheme.code == "int8":
            values = planes[0].float()
        else:
            values = unpack(planes, self.scheme.bits, self.columns).float()
        scales, zeros = (self._of(name, start, stop) for name in ("scales", "zeros"))
        group, columns = self.scheme.group or self.columns, self.columns
        assert scales is not None
        if group * scales.shape[1] != columns:
            values = torch.nn.functional.pad(values, (0, group * scales.shape[1] - columns))
        values = values.unflatten(1, (-1, group))
        if zeros is not None:
            values -= zeros.unsqueeze(-1)
        elif self.zero:
            values -= self.zero
        values *= scales.unsqueeze(-1)
        return values.flatten(1)[:, :columns]

    def _of(self, name: str, start: int, stop: int) -> Tensor | None:
        values = self.weights.get(name)
        if values is None:
            return None
        if "scale_rows" in self.weights:
            return values[self.weights["scale_rows"][start:stop]].float()
        return values[start:stop].float() if len(values) != 1 else values.float()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        activation = self.scheme.activation
        if activation is not None:
            x = fake_quantize(x, activation, self.weights.get("input_scale"))
        if (order := self.weights.get("order")) is not None:
            x = x.index_select(-1, order)
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        for start in self.starts:
            stop = min(start + self.rows_at_once, self.shape[0])
            out[..., start:stop] = torch.nn.functional.linear(x, self.dequant(start, stop).to(x.dtype))
        return out if bias is None else out + bias


def _fp8(codes: Tensor) -> Tensor:
    """E4M3 codes -> their values times 2^-8, exactly, in float32: the bits are moved to where float16 has them.

    A dozen times as fast on CPU as torch's conversion. NaN codes become +-480 times 2^-8; loading refuses them.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float()
