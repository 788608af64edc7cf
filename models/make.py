"""Make: builds a model's layers with this run's dtype, device and quantization, which a model file never names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..quant import LayerShape, Linear, Part, QuantizationConfig, Unquantized
from .layers import Embedding, RMSNorm
from .rope import RopeConfig, Rotary


@dataclass(frozen=True, kw_only=True)
class Make:
    """A layer factory at one place (`prefix`) of the checkpoint's name tree.

    `max_len` bounds the rotary tables; `quant` None leaves every layer unquantized.
    """

    dtype: torch.dtype
    device: torch.device
    max_len: int
    quant: QuantizationConfig | None = None
    prefix: str = ""

    def at(self, name: str) -> Make:
        """The factory one level down: names made there start with `name`."""
        return replace(self, prefix=self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        return self.fused([(name, out_features)], in_features, bias=bias)

    def fused(self, parts: Sequence[tuple[str, int]], in_features: int, *, bias: bool = False) -> Linear:
        """One matrix made of several checkpoint matrices, given as (name, output size) in order."""
        shape = LayerShape(in_features=in_features, bias=bias, parts=tuple(Part(name=n, size=s) for n, s in parts))
        method = self.quant.method_for(self._full(parts[0][0]), shape) if self.quant else None
        return Linear(self.prefix, shape, method or Unquantized(), dtype=self.dtype, device=self.device)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self._full(name), size, eps, dtype=self.dtype, device=self.device)

    def embedding(self, name: str, vocab: int, size: int) -> Embedding:
        return Embedding(self._full(name), vocab, size, dtype=self.dtype, device=self.device)

    def rotary(self, config: RopeConfig, head_dim: int) -> Rotary:
        return Rotary(config, head_dim, self.max_len, dtype=self.dtype, device=self.device)
