"""Experts' FP8 products by CUTLASS: slots in rows by expert, one launch a product, none of it decided on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..launch import early, multiprocessors
from ..ops import load_op
from ..quantize.reference import FP8_MAX, SCALE_MIN

CHUNK = 1024
BY_AVERAGE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Slot t * top_k + j is token t's j-th expert. `of_slot` [T, top_k] int32: its row, -1 for expert -1; rows
    [offsets[e], offsets[e + 1]) are expert e's, `offsets` [E + 1] int32. There are as many rows as slots; those beyond
    the last offset are nobody's."""

    of_slot: Tensor
    offsets: Tensor


def sort_slots(experts: Tensor, count: int) -> Rows:
    """The rows of experts [T, top_k] (numbers below `count`, or -1), in the order of tokens."""
    from .triton_rows import sort_kernel

    rows = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    sort_kernel[(count,)](experts, offsets, rows, experts.numel(), count, BINS=1 << (count - 1).bit_length(),
                          CHUNK=CHUNK, num_warps=4, **early(experts.device))
    return Rows(of_slot=rows, offsets=offsets)


def scatter_quantized(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """x [T, K] -> FP8 codes [slots, K] and float32 scales [slots] of every row, rounded by its token's maximum."""
    from .triton_rows import scatter_kernel

    (tokens, columns), top_k = x.shape, rows.of_slot.shape[1]
    codes, scales = _empty_codes(tokens * top_k, columns, x.device)
    block = 1 << (columns - 1).bit_length()
    scatter_kernel[(tokens,)](x, rows.of_slot, codes, scales, columns, TOP_K=top_k, FP8_MAX=FP8_MAX,
                              SCALE_MIN=SCALE_MIN, BLOCK=block, num_warps=_warps(block), **early(x.device))
    return codes, scales


def silu_quantized(gate_up: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of gate_up [slots, 2 I], in float32, as FP8 codes [slots, I] and float32 scales [slots]."""
    from .triton_rows import silu_kernel

    slots, columns = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scales = _empty_codes(slots, columns, gate_up.device)
    block = 1 << (columns - 1).bit_length()
    silu_kernel[(slots,)](gate_up, rows.offsets[-1:], codes, scales, columns, FP8_MAX=FP8_MAX, SCALE_MIN=SCALE_MIN,
                          BLOCK=block, num_warps=_warps(block), **early(gate_up.device))
    return codes, scales


def add_rows(y: Tensor, weights: Tensor, rows: Rows, *, dtype: torch.dtype = torch.float32,
             beside: Tensor | None = None) -> Tensor:
    """y [slots, H], weights [T, top_k] float32 -> [T, H]: each token's weighted sum, in order, as `combine` has it."""
    from .triton_rows import add_rows_kernel

    tokens, top_k = rows.of_slot.shape
    out = y.new_empty(tokens, y.shape[1], dtype=dtype)
    add_rows_kernel[(tokens, -(-y.shape[1] // CHUNK))](
        y, weights, rows.of_slot, out if beside is None else beside.contiguous(), out, y.shape[1], TOP_K=top_k,
        HAS_BESIDE=beside is not None, BLOCK=CHUNK, **early(y.device))
    return out


class GroupedFp8:
    """The compiled product for layers of `experts` experts; keeps what describes a step to CUTLASS.

    Steps share that memory, so calls must follow each other on one stream.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.multiprocessors = multiprocessors(device)
        size = load_op("grouped_fp8_workspace")(experts, self.multiprocessors)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.gemm = load_op("grouped_fp8_gemm")

    def __call__(self, x: Tensor, x_scales: Tensor, weights: Tensor, scales: Tensor, rows: Rows,
                 config: int = BY_AVERAGE) -> Tensor:
        """x [slots, K] FP8 with scales [slots], weights [E, N, K] FP8 with scales [E, N] -> [slots, N] bfloat16.

        Rows that are nobody's are left unwritten. config: a tile of grouped_problem.cuh; by default the average of
        rows an expert decides.
        """
        out = torch.empty(len(x), weights.shape[1], dtype=torch.bfloat16, device=x.device)
        self.gemm(out, x, weights, rows.offsets, x_scales, scales, self.workspace, config, self.multiprocessors)
        return out


def _empty_codes(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(rows, dtype=torch.float32, device=device))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
