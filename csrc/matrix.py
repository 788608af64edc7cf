"""QuantizedMatrix: a quantized weight as every kernel can read it, whatever the checkpoint's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .scheme import Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """W [N, K], W[n, k] = (code[n, k] - zero[r, g]) * scale[r, g], r = scale_rows[n], g = groups[k].

    Attributes:
        rows, columns: N and K.
        codes: rows [start, stop) -> their codes [stop - start, K] in the order of the inputs: uint8, int8 or
            float8_e4m3fn. Asked for tile by tile, so that no method need hold them all.
        scales: [R, G] in floating point.
        zeros: [R, G] uint8; None: 2^(bits - 1) for unsigned codes, 0 for others.
        scale_rows: int32 [N]; None: R is N, or 1 for all.
        groups: int [K], where inputs are scattered over the groups; None: k // scheme.group.
        input_scale: one float32 value, for a static activation.
    """

    scheme: Scheme
    rows: int
    columns: int
    codes: Callable[[int, int], Tensor]
    scales: Tensor
    zeros: Tensor | None = None
    scale_rows: Tensor | None = None
    groups: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def zero(self) -> int:
        """The zero of every code where none are stored."""
        return 1 << (self.scheme.bits - 1) if self.scheme.code == "uint" else 0

    @cached_property
    def order(self) -> Tensor | None:
        """The inputs [K] int64 sorted by group, stable; None when they are in order."""
        return None if self.groups is None else torch.argsort(self.groups, stable=True)

    @cached_property
    def even(self) -> bool:
        """Whether sorting by group gives whole groups of the scheme's size (the last may be short)."""
        if self.groups is None or self.order is None:
            return True
        there = torch.arange(self.columns, device=self.groups.device) // (self.scheme.group or self.columns)
        return torch.equal(self.groups[self.order].long(), there)

    def part(self, start: int, stop: int) -> QuantizedMatrix:
        """The matrix of rows [start, stop) alone; shares all memory with this one."""
        codes, scale_rows = self.codes, self.scale_rows
        scales, zeros = self.scales, self.zeros
        if scale_rows is not None:
            scale_rows = scale_rows[start:stop]
            first, last = int(scale_rows[0]), int(scale_rows[-1])
            scale_rows = scale_rows - first
        else:
            first, last = (start, stop - 1) if len(scales) != 1 else (0, 0)
        scales, zeros = scales[first : last + 1], None if zeros is None else zeros[first : last + 1]
        return replace(self, rows=stop - start, codes=lambda low, high: codes(start + low, start + high), scales=scales,
                       zeros=zeros, scale_rows=scale_rows)

    def dequant(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W, float32 [stop - start, K]: the reference."""
        codes = self.codes(start, stop).float()
        scales, zeros = (self._spread(t, start, stop) for t in (self.scales, self.zeros))
        assert scales is not None
        return (codes - (self.zero if zeros is None else zeros)) * scales

    def _spread(self, values: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Scales or zeros [R, G] as float32 [stop - start, K], or [1, K] where all rows share them."""
        if values is None:
            return None
        if self.scale_rows is not None:
            values = values[self.scale_rows[start:stop]]
        elif len(values) != 1:
            values = values[start:stop]
        values = values.float()
        if self.groups is not None:
            return values[:, self.groups]
        group = self.scheme.group
        return values if group is None else values.repeat_interleave(group, dim=1)[:, : self.columns]
