"""Layers with weights of their own besides Linear: RMSNorm, Embedding, LMHead, and the gated MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..csrc.norm_rope import rms_norm, silu_mul
from ..quant import FLOAT_SOURCES, Slot


class RMSNorm(nn.Module):
    """x [..., D] -> (normed [..., D], x + residual [..., D])."""

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def slots(self) -> Iterator[Slot]:
        yield Slot(name=f"{self.name}.weight", target=self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, residual)


class Embedding(nn.Module):
    """Token ids [T] -> rows [T, D]."""

    def __init__(self, name: str, vocab: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty(vocab, size, dtype=dtype, device=device)

    def slots(self) -> Iterator[Slot]:
        yield Slot(name=f"{self.name}.weight", target=self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class TiedHead(nn.Module):
    """An output matrix that is the embedding; a file that stores it as well must agree."""

    def __init__(self, name: str, embedding: Embedding) -> None:
        super().__init__()
        self.name, self.weight = name, embedding.weight

    def slots(self) -> Iterator[Slot]:
        yield Slot(name=f"{self.name}.weight", target=self.weight, sources=FLOAT_SOURCES, optional=True, alias=True)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


