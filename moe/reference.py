"""ReferenceBackend: one expert after another, each as the linear layers it is; any scheme, any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..csrc.norm_rope import silu_mul
from .backend import Expert, MoEBackend, MoEProblem


class ReferenceBackend(MoEBackend):
    """Every linear layer keeps the kernel that it would have anywhere; experts without tokens are never touched."""

    name: ClassVar[str] = "reference"
    priority: ClassVar[int] = -10

    @classmethod
    def supports(cls, problem: MoEProblem) -> str | None:
        return None

    def __init__(self, experts: Sequence[Expert], problem: MoEProblem) -> None:
        self.experts, self.tensors = experts, {}
        for expert in experts:
            for linear in expert.linears():
                linear.pack()

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = x.new_zeros(x.shape, dtype=torch.float32)
        slots = experts.flatten()
        order = slots.argsort(stable=True)  # by expert, then token
        counts = torch.bincount(slots + 1, minlength=len(self.experts) + 1).tolist()
        start = counts[0]
        for number, count in enumerate(counts[1:]):
            if count:
                mine = order[start : start + count]
                tokens = mine // experts.shape[1]
                gate_up, down = self.experts[number]
                y = down(silu_mul(gate_up(x[tokens]))).float()
                out.index_add_(0, tokens, y * weights.flatten()[mine, None])
                start += count
        return out
