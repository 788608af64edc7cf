"""Experts' products for many rows each: rows by expert, weights in 16 bits, torch's grouped product of some experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..launch import early
from .grouped import Rows

HOPPER = (9, 0)
ALIGNMENT = 16  # bytes, of a row of inputs or outputs
MAX_BLOCK = 4096  # values of a row that a program moves


def grouped_refusal(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's grouped product cannot take matrices [rows, columns] without asking the host; None when it can."""
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) != HOPPER):
        return "torch has a grouped product of bfloat16 on Hopper; elsewhere it takes one expert after another"
    if rows * dtype.itemsize % ALIGNMENT or columns * dtype.itemsize % ALIGNMENT:
        return f"needs rows of whole {ALIGNMENT} bytes, not {columns} and {rows} values"
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Experts [first, last) of a step of experts [T, top_k], whose rows are counted from the first one's first."""

    experts: Tensor
    rows: Rows
    first: int
    last: int

    @cached_property
    def ends(self) -> Tensor:
        """The row behind each expert's last, int32 [last - first]."""
        return self.rows.offsets[self.first + 1 : self.last + 1] - self.rows.offsets[self.first]

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [slots, K], weights [last - first, N, K] of one 16-bit dtype -> [slots, N]; rows of nobody are not written.

        Sums are float32, rounded once.
        """
        return torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=self.ends)

    def scatter(self, x: Tensor, order: Tensor | None) -> Tensor:
        """x [T, K] -> [slots, K]: each token in the rows of its experts, inputs in these experts' order [E, K]."""
        from .triton_rows import scatter_rows_kernel

        columns = x.shape[1]
        out = x.new_empty(self.experts.numel(), columns)
        block = _block(columns)
        scatter_rows_kernel[(len(out), -(-columns // block))](
            x, self.experts, self.rows.of_slot, self.rows.offsets, x if order is None else order, out, columns,
            self.first, self.last, TOP_K=self.experts.shape[1], HAS_ORDER=order is not None, BLOCK=block,
            num_warps=_warps(block), **early(x.device))
        return out

    def gated(self, gate: Tensor, up: Tensor, order: Tensor | None) -> Tensor:
        """silu(gate) * up of both [slots, K], in float32, rounded once; in these experts' order [E, K] or in gate."""
        from .triton_rows import gated_rows_kernel

        columns = gate.shape[1]
        out = gate if order is None else torch.empty_like(gate)
        block = _block(columns)
        gated_rows_kernel[(len(out), -(-columns // block))](
            gate, up, self.experts, self.rows.of_slot, self.rows.offsets, up if order is None else order, out, columns,
            self.first, self.last, HAS_ORDER=order is not None, BLOCK=block, num_warps=_warps(block),
            **early(gate.device))
        return out

    def place(self, y: Tensor, out: Tensor) -> None:
        """These experts' rows of y [slots, H] to where they are among all rows out [slots, H]."""
        from .triton_rows import place_rows_kernel

        block = _block(y.shape[1])
        place_rows_kernel[(len(y), -(-y.shape[1] // block))](
            y, self.experts, self.rows.of_slot, self.rows.offsets, out, y.shape[1], self.first, self.last, BLOCK=block,
            num_warps=_warps(block), **early(y.device))


def _block(columns: int) -> int:
    return min(MAX_BLOCK, 1 << (columns - 1).bit_length())


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))
