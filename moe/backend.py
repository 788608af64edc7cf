"""MoEBackend: one way to run a layer's experts, chosen for their schemes and shapes, or refused with a reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..csrc.matrix import QuantizedMatrix
from ..csrc.quantize import Quantized, Rounding
from ..csrc.scheme import Scheme
from ..csrc.select import Choice, choose
from ..quant import Linear, SplitLinear

PLAIN = "plain"


class Expert(NamedTuple):
    """One expert's layers: gate and up side by side, and down. Filled and checked, not yet packed."""

    gate_up: nn.Module
    down: Linear

    def linears(self) -> list[Linear]:
        """Its one to three linear layers."""
        parts = self.gate_up.parts if isinstance(self.gate_up, SplitLinear) else [self.gate_up]
        return [*(part for part in parts if isinstance(part, Linear)), self.down]

    @property
    def schemes(self) -> tuple[Scheme | str | None, ...]:
        """How each is stored: a scheme, PLAIN, or None for codes that no kernel knows."""
        return tuple(PLAIN if linear.method.plain else linear.method.scheme for linear in self.linears())

    def matrices(self) -> list[QuantizedMatrix]:
        """What kernels read of each quantized layer."""
        found = [linear.method.matrix(linear.weights) for linear in self.linears()]
        return [matrix for matrix in found if matrix is not None]


@dataclass(frozen=True, kw_only=True)
class MoEProblem:
    """Experts of one kind to be run.

    Attributes:
        schemes: of gate and up (one entry where they share storage, else two) and down, as `Expert.schemes`.
        even: `QuantizedMatrix.even` of all of them.
        experts, top_k, hidden, intermediate: sizes; `experts` counts those of this kind.
    """

    schemes: tuple[Scheme | str | None, ...]
    even: bool
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    device: torch.device


class MoEBackend(ABC):
    """Runs experts of one kind. A plugin of kind "moe_backend": a class, made once for each kind in a layer.

    The constructor may pack the experts' weights and drop the originals; `tensors` are then all that stays in memory.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    tensors: Mapping[str, Tensor]
    rounding: Rounding | None = None
    """How `run_rounded` takes inputs; None: not at all."""

    @classmethod
    @abstractmethod
    def supports(cls, problem: MoEProblem) -> str | None:
        """None when it can run `problem`, else the reason why not."""

    @abstractmethod
    def __init__(self, experts: Sequence[Expert], problem: MoEProblem) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The experts' part of the layer's output.

        Args:
            x: [T, hidden]. weights: [T, top_k] float32.
            experts: [T, top_k] int64, numbers among the experts this backend was made with, a token's all different; -1
                is somebody else's, or a row that is only padding, and adds nothing.
        Returns:
            [T, hidden] float32: the weighted sum over each token's experts, added up in a fixed order.
        """

    def run_all(self, x: Tensor, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        """The layer's output [T, hidden] in x's dtype when all experts are of one kind: the sum, rounded, and `beside`.

        A backend that adds up in a launch of its own can do this in the same one.
        """
        out = self(x, weights, experts).to(x.dtype)
        return out if beside is None else out + beside

    def run_rounded(self, x: Quantized, weights: Tensor, experts: Tensor, beside: Tensor | None) -> Tensor:
        """`run_all` of inputs that were rounded before, as `rounding` says; their values are there, too."""
        assert x.values is not None
        return self.run_all(x.values, weights, experts, beside)


@dataclass(frozen=True, kw_only=True)
class Backends:
    """The MoE backends of this process, and the user's pin; `broken` are those a plugin could not give, with causes."""

    known: Mapping[str, type[MoEBackend]] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    pin: str | None = None

    def choose(self, problem: MoEProblem) -> Choice[type[MoEBackend]]:
        choice = choose([problem], self.known, self.pin)
        return Choice(chosen=choice.chosen, refusals={**choice.refusals, **self.broken})
