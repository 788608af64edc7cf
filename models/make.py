"""Make: builds a model's layers with this run's dtype, device and quantization, which a model file never names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..csrc.select import Kernels
from ..quant import (
    Found,
    LayerShape,
    Linear,
    LinearMethod,
    Part,
    QuantizationConfig,
    SplitLinear,
    Unquantized,
)
from .layers import Embedding, RMSNorm
from .rope import RopeConfig, Rotary


@dataclass(frozen=True, kw_only=True)
class Make:
    """A layer factory at one place (`prefix`) of the checkpoint's name tree.

    `max_len` bounds the rotary tables; `kernels` are what may run a quantized layer; `quant` None leaves every layer
    unquantized; `stored` is what the checkpoint holds of each module, None when weights are made up.
    """

    dtype: torch.dtype
    device: torch.device
    max_len: int
    kernels: Kernels = field(default_factory=Kernels)
    quant: QuantizationConfig | None = None
    stored: Mapping[str, Found] | None = None
    prefix: str = ""

    def at(self, name: str) -> Make:
        """The factory one level down: names made there start with `name`."""
        return replace(self, prefix=self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        return self.fused([(name, out_features)], in_features, bias=bias)

    def fused(self, parts: Sequence[tuple[str, int]], in_features: int, *, bias: bool = False) -> nn.Module:
        """One matrix made of several checkpoint matrices, given as (name, output size) in order.

        Parts that the checkpoint stores in different ways become layers of their own behind one call.
        """
        declared = [Part(name=name, size=size) for name, size in parts]
        methods = [self._method(part, in_features) for part in declared]
        if len(declared) == 1 or (len(set(methods)) == 1 and methods[0].fusable):
            return self._linear(declared, in_features, methods[0], bias)
        return SplitLinear([self._linear([p], in_features, m, bias) for p, m in zip(declared, methods)])

    def _method(self, part: Part, in_features: int) -> LinearMethod:
        if self.quant is None:
            return Unquantized()
        name = self._full(part.name)
        found = None if self.stored is None else self.stored.get(name, {})
        shape = LayerShape(in_features=in_features, parts=(part,))
        return self.quant.method_for(name, shape, found) or Unquantized()

    def _linear(self, parts: Sequence[Part], in_features: int, method: LinearMethod, bias: bool) -> Linear:
        shape = LayerShape(in_features=in_features, bias=bias, parts=tuple(parts))
        return Linear(self.prefix, shape, method, dtype=self.dtype, device=self.device,
                      kernels=self.kernels)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self._full(name), size, eps, dtype=self.dtype, device=self.device)

    def embedding(self, name: str, vocab: int, size: int) -> Embedding:
        return Embedding(self._full(name), vocab, size, dtype=self.dtype, device=self.device)

    def rotary(self, config: RopeConfig, head_dim: int) -> Rotary:
        return Rotary(config, head_dim, self.max_len, dtype=self.dtype, device=self.device)
