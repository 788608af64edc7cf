"""Experts: a layer's experts, loaded one by one, run by kinds of equal scheme, each by the backend that suits it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..csrc.quantize import Quantized, Rounding
from ..plugins.errors import NybbleError, PluginError, UsageError
from ..quant import Slot
from .backend import Backends, Expert, MoEBackend, MoEProblem


class Experts(nn.Module):
    """y = sum over a token's experts of weight * down(silu(gate(x)) * up(x)), added in float32.

    Args:
        name: its place in the checkpoint, for messages.
        experts: in order; their linear layers are this module's own.
        count: whether to count the tokens of every expert.
        stacks: slots that fill all experts at once, where they have no tensors of their own.
    """

    def __init__(self, name: str, experts: Sequence[Expert], *, hidden: int, intermediate: int, top_k: int,
                 dtype: torch.dtype, device: torch.device, backends: Backends, count: bool = False,
                 stacks: Sequence[Slot] = ()) -> None:
        super().__init__()
        self.name, self.experts, self.backends, self.stacks = name, list(experts), backends, stacks
        self.layers = nn.ModuleList(linear for expert in experts for linear in expert.linears())
        self.sizes = {"top_k": top_k, "hidden": hidden, "intermediate": intermediate}
        self.dtype, self.device = dtype, device
        self.runs: list[tuple[MoEBackend, Tensor | None]] = []
        self.extremes: list[list[int]] = []
        """Routings between which what backends need lies, as experts for `dealt`: all of them alike, and for each kind
        every token to the same top_k, of this kind as far as it has so many. Known once loaded."""
        self._dealt: Tensor | None = None
        # one more for the expert -1, which is nobody: a single operation then counts, and it never waits for the device
        self._tally = torch.zeros(len(self.experts) + 1, dtype=torch.int64, device=device) if count else None
        self._one = torch.ones((), dtype=torch.int64, device=device) if count else None

    @property
    def counts(self) -> Tensor | None:
        """[E] int64: the tokens of every expert so far, on the device; None unless they are counted."""
        return None if self._tally is None else self._tally[:-1]

    def slots(self) -> Iterator[Slot]:
        return iter(self.stacks)

    def after_load(self) -> None:
        """Check every expert, sort them by kind, and give each kind to its backend."""
        kinds: dict[object, list[int]] = {}
        evens: list[bool] = []
        for number, expert in enumerate(self.experts):
            for linear in expert.linears():
                linear.check()
            evens.append(all(matrix.even for matrix in expert.matrices()))
            kinds.setdefault((expert.schemes, evens[-1]), []).append(number)
        for numbers in kinds.values():
            first = self.experts[numbers[0]]
            problem = MoEProblem(schemes=first.schemes, even=evens[numbers[0]], experts=len(numbers), dtype=self.dtype,
                                 device=self.device, **self.sizes)
            backend = self._make(problem, [self.experts[number] for number in numbers])
            self.runs.append((backend, None if len(kinds) == 1 else self._local(numbers)))
        everybody = list(range(len(self.experts)))
        crowds = (numbers + [number for number in everybody if number not in numbers] for numbers in kinds.values())
        self.extremes = [everybody, *(crowd[: self.sizes["top_k"]] for crowd in crowds)]

    @contextmanager
    def dealt(self, numbers: Sequence[int]) -> Iterator[None]:
        """While this lasts, slots go to the experts `numbers` in turn, whatever was chosen: to see what that takes."""
        self._dealt = torch.tensor(numbers, device=self.device)
        try:
            yield
        finally:
            self._dealt = None

    def _make(self, problem: MoEProblem, experts: list[Expert]) -> MoEBackend:
        choice = self.backends.choose(problem)
        if choice.chosen is None:
            pin, schemes = self.backends.pin, ", ".join(str(scheme) for scheme in problem.schemes)
            raise UsageError(f"{self.name}: no MoE backend can run these experts ({schemes})" if pin is None
                             else f"{self.name}: the pinned MoE backend {pin} cannot run these experts",
                             found="; ".join(f"{name}: {why}" for name, why in choice.refusals.items()),
                             fix="leave --moe-backend out, or pin another")
        for expert in experts:
            for linear in expert.linears():
                linear.owner, linear.refusals = choice.chosen.name, choice.refusals
                linear.packed = True  # or not, as the backend likes: nobody else shall
        try:
            return choice.chosen(experts, problem)
        except NybbleError:
            raise
        except Exception as exc:
            name = choice.chosen.name
            raise PluginError(f"{self.name}: MoE backend {name} said it could run these experts, then failed",
                              found=f"{type(exc).__name__}: {exc}", fix="pin another: --moe-backend reference") from exc

    def _local(self, numbers: list[int]) -> Tensor:
        """[E + 1]: an expert's number among `numbers`, -1 for all others; entry -1 stays -1."""
        local = torch.full((len(self.experts) + 1,), -1, dtype=torch.int64, device=self.device)
        local[torch.tensor(numbers, device=self.device)] = torch.arange(len(numbers), device=self.device)
        return local

    @property
    def rounding(self) -> Rounding | None:
        """How inputs may be given rounded, known once loaded; None: not at all."""
        return self.runs[0][0].rounding if len(self.runs) == 1 else None

    def forward(self, x: Tensor | Quantized, weights: Tensor, experts: Tensor, beside: Tensor | None = None) -> Tensor:
        """x [T, hidden], or Quantized with its values where `rounding` asks for it, weights [T, top_k] float32, experts
        [T, top_k] int64 -> [T, hidden] in x's dtype.

        `beside` [T, hidden] is added to the rounded sum.
        """
        if self._dealt is not None:
            turns = torch.arange(experts.numel(), device=experts.device) % len(self._dealt)
            experts = self._dealt[turns].view_as(experts)
        if self._tally is not None and self._one is not None:
            self._tally.put_(experts, self._one.expand_as(experts), accumulate=True)
        if isinstance(x, Quantized):
            return self.runs[0][0].run_rounded(x, weights, experts, beside)
        if len(self.runs) == 1:
            return self.runs[0][0].run_all(x, weights, experts, beside)
        total: Tensor | None = None
        for backend, local in self.runs:
            part = backend(x, weights, experts if local is None else local[experts])
            total = part if total is None else total + part
        assert total is not None, "after_load comes first"
        out = total.to(x.dtype)
        return out if beside is None else out + beside

    def extra_repr(self) -> str:
        return ", ".join([f"{len(self.experts)} experts", *(f"{k} {v}" for k, v in self.sizes.items())])
