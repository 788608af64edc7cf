"""Layers with weights of their own besides Linear: RMSNorm, Embedding, LMHead, and the gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..csrc.launch import missing
from ..csrc.norm_rope import fused_rms_norm, fused_silu_mul, rms_norm_for, silu_mul, silu_mul_for
from ..csrc.quantize import Quantized, Rounding
from ..quant import FLOAT_SOURCES, Slot, shared_rounding

# What the fused kernels ask of a device.
CAPABILITY = (8, 0)


class RMSNorm(nn.Module):
    """x [..., D] -> (normed [..., D], x + residual [..., D]).

    One launch on CUDA, where a norm that feeds products of codes gives them as `Quantized`.
    """

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.fused = missing(device, CAPABILITY) is None
        self._plain = rms_norm_for(device)
        self._rounding: Rounding | None = None
        self._keep = False
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def slots(self) -> Iterator[Slot]:
        yield Slot(name=f"{self.name}.weight", target=self.weight)

    def feed(self, *consumers: nn.Module) -> None:
        """From now on round for the modules that take the normed values, if all of them want the same.

        One with an attribute `keeps_values` is given them before they were rounded, too.
        """
        self._rounding = shared_rounding(consumers) if self.fused else None
        self._keep = any(getattr(consumer, "keeps_values", False) for consumer in consumers)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor | Quantized, Tensor]:
        if self.fused:
            return fused_rms_norm(x, self.weight, self.eps, residual, self._rounding, self._keep)
        return self._plain(x, self.weight, self.eps, residual)


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
        self._fused = False
        self._plain: Callable[[Tensor], Tensor] = silu_mul
        self._inner: Rounding | None = None

    @property
    def rounding(self) -> Rounding | None:
        return shared_rounding([self.gate_up])

    def connect(self) -> None:
        """Join what lies between the products in one launch, and round there for the second one."""
        device = getattr(self.gate_up, "device", torch.device("cpu"))
        self._fused, self._plain = missing(device, CAPABILITY) is None, silu_mul_for(device)
        self._inner = shared_rounding([self.down])

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if self._fused:
            return self.down(fused_silu_mul(self.gate_up(x), self._inner))
        return self.down(self._plain(self.gate_up(x)))


