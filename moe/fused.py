"""FusedBackend: all experts of a kind in a few launches on CUDA, whatever the routing, without asking the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..csrc.launch import Tile, missing, tile_for
from ..csrc.matrix import QuantizedMatrix
from ..csrc.moe_gemm import CodedStack, PackedStack, Stack
from ..csrc.moe_route import align, combine
from ..csrc.quantize import Quantized
from ..csrc.scheme import Activation, Scheme
from ..csrc.w4a16_gemm.packing import MIN_BLOCK, block_of
from .backend import PLAIN, Expert, MoEBackend, MoEProblem
from .many_rows import ManyRows

# By the slots that an expert has on average: more of them than that only pad.
FEW_TOKENS = 8
TILES = (Tile(n=64, m=16, warps=4, stages=4), Tile(n=64, m=32, warps=4, stages=4), Tile(n=64, m=64, warps=4, stages=4),
         Tile(n=128, m=64, warps=8, stages=3))


class FusedBackend(MoEBackend):
    """Triton: slots sorted by expert, gate and up with their activation, down, and the weighted sum.

    8-bit inputs are rounded per token or group. A static input scale, which differs between experts, is left aside:
    inputs stay in 16 bits then, nearer to the exact product. Sums are float32, without atomics: the same every time.
    Unsigned codes and 16-bit weights of experts that have many rows are multiplied by torch (moe/many_rows.py).
    """

    name: ClassVar[str] = "fused"
    priority: ClassVar[int] = 10
    many_rows: ManyRows | None = None
    small_tiles: bool = False

    @classmethod
    def supports(cls, problem: MoEProblem) -> str | None:
        if (reason := missing(problem.device, (8, 0))) is not None:
            return reason
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"multiplies 16-bit inputs, not {str(problem.dtype).removeprefix('torch.')}"
        if len(set(problem.schemes[:-1])) != 1:
            return "gate and up are stored in different ways"
        return next(filter(None, (_refusal(scheme, problem) for scheme in problem.schemes)), None)

    def __init__(self, experts: Sequence[Expert], problem: MoEProblem) -> None:
        self.count, self.intermediate = len(experts), problem.intermediate
        first, last = problem.schemes[0], problem.schemes[-1]
        self.gate, self.up, self.down = (_stack(scheme, len(experts), problem) for scheme in (first, first, last))
        for number, expert in enumerate(experts):
            for stack, matrix in zip((self.gate, self.up, self.down), _matrices(expert, problem.intermediate)):
                if isinstance(matrix, Tensor):
                    assert isinstance(stack, CodedStack)
                    stack.put_plain(number, matrix)
                else:
                    assert isinstance(stack, CodedStack | PackedStack)
                    stack.put(number, matrix)
            for linear in expert.linears():
                linear.release(0)
        self.many_rows = ManyRows.over(self.gate, self.up, self.down, problem.dtype, problem.device)
        self.rounding = self.gate.rounding
        self.small_tiles = all(stack.small_tiles for stack in (self.gate, self.up, self.down))
        self.tensors = {f"{name}.{key}": tensor
                        for name, stack in (("gate", self.gate), ("up", self.up), ("down", self.down))
                        for key, tensor in stack.tensors.items()}
        for expert in experts:
            *beside, below = expert.linears()
            for linear in beside:
                linear.release((self.gate.nbytes + self.up.nbytes) // len(experts) // len(beside))
            below.release(self.down.nbytes // len(experts))

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self._run(x, weights, experts, torch.float32, None)

    def run_all(self, x: Tensor, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        return self._run(x, weights, experts, x.dtype, beside)

    def run_rounded(self, x: Quantized, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        assert x.values is not None
        return self._run(x.values, weights, experts, x.dtype, beside, x)

    def _run(self, x: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype, beside: Tensor | None,
             rounded: Quantized | None = None) -> Tensor:
        tokens, top_k = experts.shape
        slots = tokens * top_k
        if not slots:
            return x.new_zeros(x.shape, dtype=dtype)
        x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
        if self.many_rows is not None and slots >= self.many_rows.least_slots:
            return self.many_rows.run(x, weights, experts, dtype, beside)
        tile = tile_for(-(-slots // self.count), TILES)
        if tokens <= FEW_TOKENS and self.small_tiles:  # no expert has more slots than there are tokens
            tile = replace(tile, m=FEW_TOKENS)
        layout = align(experts, self.count, tile.m)
        hidden = x.new_empty(slots, self.intermediate)
        self.gate.run(x if rounded is None else rounded, layout, hidden, tile, rows_per_slot=top_k, up=self.up)
        y = x.new_empty(slots, x.shape[1])
        self.down.run(hidden, layout, y, tile, rows_per_slot=1, up=None)
        return combine(y, weights, experts, dtype=dtype, beside=beside)


def _refusal(scheme: Scheme | str | None, problem: MoEProblem) -> str | None:
    """Why experts stored like that cannot be run; None when they can."""
    if scheme == PLAIN:
        return None
    if not isinstance(scheme, Scheme):
        return "the experts' codes are known to their method alone"
    if scheme.code == "uint":
        if scheme.activation is not None:
            return "multiplies unsigned codes by inputs that are not quantized"
        if scheme.bits not in (2, 3, 4, 8) or scheme.group_rows != 1:
            return f"unpacks 2, 3, 4 and 8 bits with scales by group, not {scheme}"
        if block_of(scheme.group) < MIN_BLOCK:
            return f"needs groups of a multiple of {MIN_BLOCK} inputs, not {scheme.group}"
        return None if problem.even else "inputs are scattered over groups of unequal size"
    if scheme.code not in ("fp8_e4m3", "int8") or scheme.zero_point:
        return f"multiplies uint, int8 and fp8_e4m3 codes, not {scheme}"
    if scheme.act_order or not problem.even:
        return "8-bit codes must lie in the order of their inputs"
    groups = [group for group in (scheme.group, scheme.activation and scheme.activation.group) if group]
    if math.gcd(128, *groups) < MIN_BLOCK:
        return f"needs groups of a multiple of {MIN_BLOCK} inputs, not {groups}"
    return None


def _rounding(scheme: Scheme, device: torch.device) -> Activation | None:
    """How inputs are rounded: as the scheme says, unless by a scale that was measured before, or the device cannot."""
    activation = scheme.activation
    if activation is None or activation.static or activation.dtype != scheme.code:
        return None
    fp8 = scheme.code == "fp8_e4m3" and device.type == "cuda"
    return None if fp8 and torch.cuda.get_device_capability(device) < (8, 9) else activation


def _stack(scheme: Scheme | str | None, count: int, problem: MoEProblem) -> Stack:
    if not isinstance(scheme, Scheme):
        return CodedStack(count, None, None)
    if scheme.code == "uint":
        return PackedStack(count)
    return CodedStack(count, scheme, _rounding(scheme, problem.device))


def _matrices(expert: Expert, intermediate: int) -> Iterator[QuantizedMatrix | Tensor]:
    """Gate, up and down, each on its own, however they are stored."""
    for linear in expert.linears():
        matrix = linear.weights["weight"] if linear.method.plain else linear.method.matrix(linear.weights)
        assert matrix is not None
        if len(linear.shape.parts) == 1:
            yield matrix
        elif isinstance(matrix, Tensor):
            yield from (matrix[:intermediate], matrix[intermediate:])
        else:
            yield from (matrix.part(0, intermediate), matrix.part(intermediate, 2 * intermediate))
