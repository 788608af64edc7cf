"""ManyRows: experts that have many rows each, as products of 16-bit weights, some experts' at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..csrc.moe_gemm import Stack
from ..csrc.moe_gemm.grouped import Rows, add_rows, sort_slots
from ..csrc.moe_gemm.many_rows import Part, grouped_refusal

SCRATCH = 512 << 20
"""Bytes of dequantized weights at a time: four matrices of a Mixtral's experts, whose products are milliseconds."""


class ManyRows:
    """Over the fused backend's stacks: rows sorted by expert, gate, up, their activation, down, and the weighted sum.

    Every expert's weights are dequantized, also where it has no row: the host is never asked. Gate, up and weights are
    rounded to 16 bits.
    """

    def __init__(self, gate: Stack, up: Stack, down: Stack) -> None:
        self.gate, self.up, self.down = gate, up, down
        stacks = (gate, up, down)
        self.scratch = max(stack.dense_size for stack in stacks)
        self.least_slots = gate.count * max(stack.dense_from or 0 for stack in stacks)

    @classmethod
    def over(cls, gate: Stack, up: Stack, down: Stack, dtype: torch.dtype, device: torch.device) -> ManyRows | None:
        """None where a stack has no 16-bit form, or torch no grouped product."""
        for stack in (gate, up, down):
            if stack.dense_from is None or grouped_refusal(*stack.shape, dtype, device) is not None:
                return None
        return cls(gate, up, down)

    def run(self, x: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype, beside: Tensor | None) -> Tensor:
        """As `MoEBackend.run_all`, all contiguous, the sum in `dtype`."""
        rows = sort_slots(experts, self.gate.count)
        parts = list(self._parts(experts, rows, x.element_size()))
        scratch = x.new_empty(self.scratch * (parts[0].last - parts[0].first))
        if len(parts) == 1:
            return add_rows(self._part(x, parts[0], scratch), weights, rows, dtype=dtype, beside=beside)
        y = x.new_empty(experts.numel(), x.shape[1])
        for part in parts:
            part.place(self._part(x, part, scratch), y)
        return add_rows(y, weights, rows, dtype=dtype, beside=beside)

    def _part(self, x: Tensor, part: Part, scratch: Tensor) -> Tensor:
        """The outputs [slots, H] of a part's experts."""
        def dense(stack: Stack) -> Tensor:
            return stack.dense(part.first, part.last, scratch)

        orders = [stack.tensors.get("order") for stack in (self.gate, self.up, self.down)]
        inputs = part.scatter(x, orders[0])
        gate = part.product(inputs, dense(self.gate))
        if orders[1] is not None:
            inputs = part.scatter(x, orders[1])
        up = part.product(inputs, dense(self.up))
        del inputs
        return part.product(part.gated(gate, up, orders[2]), dense(self.down))

    def _parts(self, experts: Tensor, rows: Rows, itemsize: int) -> Iterator[Part]:
        """As many experts at a time as the scratch holds, about equally many in each part."""
        count = self.gate.count
        most = count if self.scratch == 0 else max(1, SCRATCH // (self.scratch * itemsize))
        step = -(-count // -(-count // most))
        for first in range(0, count, step):
            yield Part(experts=experts, rows=rows, first=first, last=min(first + step, count))
