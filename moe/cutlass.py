"""CutlassBackend: experts with FP8 weights and inputs on Hopper, by CUTLASS's grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..csrc.fp8_gemm import channel_scales, cutlass_missing, scheme_refusal, shape_refusal
from ..csrc.moe_gemm import CodedStack
from ..csrc.moe_gemm.grouped import GroupedFp8, add_rows, scatter_quantized, silu_quantized, sort_slots
from ..csrc.quantize import Quantized
from ..csrc.scheme import Activation, Scheme
from ..quant import Linear
from .backend import PLAIN, Expert, MoEBackend, MoEProblem
from .fused import FusedBackend

TOKEN = Activation(dtype="fp8_e4m3", scale="token")
# Up to so many rows an expert, on average, Triton's kernels take a step: they read the weights as fast, and need no
# tensor map rewritten for every expert. Measured on an H100, a layer of Mixtral, us by them and by CUTLASS: 4 rows 453
# and 461, 64 rows 601 and 881, 1024 rows 5510 and 3336.
FEW_ROWS = 64
# The narrowest block of inputs that Triton multiplies in FP8.
MIN_BLOCK = 32


class FewRows(FusedBackend):
    """The fused backend over stacks that are another's."""

    def __init__(self, gate: CodedStack, up: CodedStack, down: CodedStack) -> None:
        self.count, self.intermediate = gate.count, gate.shape[0]
        self.gate, self.up, self.down = gate, up, down
        self.rounding, self.tensors = gate.rounding, {}


class CutlassBackend(MoEBackend):
    """Slots sorted by expert, their inputs rounded, gate and up in one product, their activation rounded, down, sum.

    Steps of few rows an expert go to the fused backend's kernels, over the same weights. A static input scale, which
    differs between experts, is left aside: each row is rounded by its own maximum, which errs less. Sums are without
    atomics: the same every time.
    """

    name: ClassVar[str] = "cutlass"
    priority: ClassVar[int] = 20

    @classmethod
    def supports(cls, problem: MoEProblem) -> str | None:
        if problem.dtype != torch.bfloat16:
            return f"gives bfloat16 outputs, not {str(problem.dtype).removeprefix('torch.')}"
        if len(set(problem.schemes[:-1])) != 1:
            return "gate and up are stored in different ways"
        sides = ((2 * problem.intermediate, problem.hidden), (problem.hidden, problem.intermediate))
        refusals = (*map(_refusal, problem.schemes), *(shape_refusal(*side) for side in sides),
                    None if problem.even else "inputs must be in order")
        return next(filter(None, refusals), None) or cutlass_missing("grouped_fp8_gemm", problem.device)

    def __init__(self, experts: Sequence[Expert], problem: MoEProblem) -> None:
        count, hidden, size = len(experts), problem.hidden, problem.intermediate
        shapes = {"gate_up": (2 * size, hidden), "down": (hidden, size)}
        self.tensors = {}
        for name, shape in shapes.items():
            self.tensors[f"{name}.codes"] = torch.empty(count, *shape, dtype=torch.float8_e4m3fn, device=problem.device)
            self.tensors[f"{name}.scales"] = torch.empty(count, shape[0], device=problem.device)
        for number, expert in enumerate(experts):
            *beside, below = expert.linears()
            self._fill("gate_up", number, beside)
            self._fill("down", number, [below])
        self.gemm = GroupedFp8(count, problem.device)
        self.few = self._few_rows(problem)
        self.rounding = None if self.few is None else self.few.rounding

    def _few_rows(self, problem: MoEProblem) -> FewRows | None:
        """None where a row is not a whole number of Triton's blocks."""
        scheme, size = problem.schemes[0], problem.intermediate
        assert isinstance(scheme, Scheme)
        if problem.hidden % MIN_BLOCK or size % MIN_BLOCK:
            return None
        stacks = [CodedStack.over(self.tensors[f"{name}.codes"][:, part], self.tensors[f"{name}.scales"][:, part],
                                  scheme, TOKEN)
                  for name, part in (("gate_up", slice(size)), ("gate_up", slice(size, None)), ("down", slice(None)))]
        return FewRows(*stacks)

    def _fill(self, name: str, number: int, linears: Sequence[Linear]) -> None:
        """Place one expert's matrix, stored in one or two layers, and let go of them."""
        codes, scales = self.tensors[f"{name}.codes"][number], self.tensors[f"{name}.scales"][number]
        row = 0
        for linear in linears:
            matrix = linear.method.matrix(linear.weights)
            assert matrix is not None
            part = slice(row, row + matrix.rows)
            codes[part], scales[part] = matrix.codes(0, matrix.rows), channel_scales(matrix)
            linear.release(codes[part].nbytes + scales[part].nbytes)
            row += matrix.rows

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self._run(x, weights, experts, torch.float32, None)

    def run_all(self, x: Tensor, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        return self._run(x, weights, experts, x.dtype, beside)

    def run_rounded(self, x: Quantized, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        assert x.values is not None
        return self._run(x.values, weights, experts, x.dtype, beside, x)

    def _run(self, x: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype, beside: Tensor | None,
             rounded: Quantized | None = None) -> Tensor:
        if not experts.numel():
            return x.new_zeros(x.shape, dtype=dtype)
        mine, count = self.tensors, len(self.tensors["down.codes"])
        if self.few is not None and experts.numel() <= FEW_ROWS * count:
            return self.few._run(x, weights, experts, dtype, beside, rounded)
        rows = sort_slots(experts.contiguous(), count)
        codes, scales = scatter_quantized(x.contiguous(), rows)
        gate_up = self.gemm(codes, scales, mine["gate_up.codes"], mine["gate_up.scales"], rows)
        codes, scales = silu_quantized(gate_up, rows)
        y = self.gemm(codes, scales, mine["down.codes"], mine["down.scales"], rows)
        return add_rows(y, weights.contiguous(), rows, dtype=dtype, beside=beside)


def _refusal(scheme: Scheme | str | None) -> str | None:
    """Why experts stored like that cannot be run; None when they can."""
    if isinstance(scheme, Scheme):
        return scheme_refusal(scheme)
    return "multiplies FP8 weights" if scheme == PLAIN else "the experts' codes are known to their method alone"
