"""Choose the kernel of a problem: the user's pin, else the highest priority that does not refuse; and say why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..plugins.errors import PluginError, UsageError, nearest
from .matrix import QuantizedMatrix
from .quantize import Quantized, Rounding
from .scheme import Scheme

P_contra = TypeVar("P_contra", contravariant=True)


class Candidate(Protocol[P_contra]):
    """Anything that can be chosen for a problem: a kernel, an attention or a MoE backend."""

    name: ClassVar[str]
    priority: ClassVar[int]

    @classmethod
    def supports(cls, problem: P_contra) -> str | None:
        """None when it can run `problem`, else the reason why not, in the words of the load report."""


C = TypeVar("C", bound=Candidate)  # type: ignore[type-arg]
P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[T]):
    """What was chosen, None when everything refused, and why each other candidate was not."""

    chosen: T | None
    refusals: Mapping[str, str]


def choose(problems: Collection[P], candidates: Mapping[str, type[C]], pin: str | None = None) -> Choice[type[C]]:
    """The candidate that runs all of `problems`. A pin is taken or refused, never replaced."""
    refusals: dict[str, str] = {}
    able: dict[str, type[C]] = {}
    for name, candidate in candidates.items():
        reason = next(filter(None, (_refusal(name, candidate, problem) for problem in problems)), None)
        if reason is not None:
            refusals[name] = reason
        elif pin in (None, name):
            able[name] = candidate
        else:
            refusals[name] = f"{pin} is pinned"
    if not able:
        return Choice(chosen=None, refusals=refusals)
    best = max(able, key=lambda name: able[name].priority)
    refusals.update({name: f"{best} goes first (priority {able[best].priority} over {c.priority})"
                     for name, c in able.items() if name != best})
    return Choice(chosen=able[best], refusals=refusals)


def _refusal(name: str, candidate: type[C], problem: object) -> str | None:
    try:
        return candidate.supports(problem)
    except Exception as exc:
        raise PluginError(f"{name} failed when asked whether it can run {problem}",
                          found=f"{type(exc).__name__}: {exc}", fix="mend its `supports`") from exc


def check_pin(pin: str | None, known: Collection[str], what: str) -> None:
    """Raise UsageError when a pinned name is nobody's."""
    if pin is not None and pin not in known:
        guess = nearest(pin, known)
        raise UsageError(f"no {what} is named {pin!r}", known=sorted(known),
                         fix=f"did you mean {guess}?" if guess else None)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A linear layer's product to be run: x [M, K] times W^T, W [N, K], for any M.

    Attributes:
        rows, columns: N and K.
        dtype: of x and of the result.
        even: `QuantizedMatrix.even`.
        scale_rows: whether scales are shared by rows as `QuantizedMatrix.scale_rows` says.
    """

    scheme: Scheme
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    even: bool = True
    scale_rows: bool = False

    @classmethod
    def of(cls, matrix: QuantizedMatrix, dtype: torch.dtype) -> Problem:
        return cls(scheme=matrix.scheme, rows=matrix.rows, columns=matrix.columns, dtype=dtype,
                   device=matrix.scales.device, even=matrix.even, scale_rows=matrix.scale_rows is not None)


class LinearKernel(ABC):
    """One way to multiply by a quantized matrix. A plugin of kind "kernel": a class, made once for each layer.

    The constructor repacks the matrix into `weights`, which is all that stays in memory. One that multiplies codes
    may set `rounding` to what it makes of its input: a norm or an activation before it then rounds in its own launch,
    and calls `run_rounded`.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    weights: Mapping[str, Tensor]
    rounding: Rounding | None = None

    @classmethod
    @abstractmethod
    def supports(cls, problem: Problem) -> str | None:
        """None when it can run `problem`, else the reason why not."""

    @abstractmethod
    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        """Pack a matrix whose problem is supported, for inputs of `dtype`."""

    @abstractmethod
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> x W^T + bias, [..., N] in x's dtype; rounds x first if the scheme has an activation."""

    def run_rounded(self, x: Quantized, bias: Tensor | None = None) -> Tensor:
        """The same product of an input [T, K] that was rounded as `rounding` says -> [T, N] in x's dtype."""
        raise AssertionError(f"{self.name} asks for no rounded input")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of this process, and the user's pin.

    `broken` are kernels whose plugin could not give them, with the cause: they refuse everything.
    """

    known: Mapping[str, type[LinearKernel]] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    pin: str | None = None

    def choose(self, problem: Problem) -> Choice[type[LinearKernel]]:
        choice = choose([problem], self.known, self.pin)
        return Choice(chosen=choice.chosen, refusals={**choice.refusals, **self.broken})
