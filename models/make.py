"""Make: builds a model's layers with this run's dtype, device and quantization, which a model file never names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..csrc.select import Kernels
from ..moe import Backends, Expert, Experts, Router, Routing
from ..moe.stacks import is_stacked, stacked_slots, stored_apart
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

    `max_len` bounds the rotary tables; `kernels` and `backends` are what may run a quantized layer and a layer of
    experts, whose tokens `count_experts` counts; `quant` None leaves every layer
    unquantized; `stored` is what the checkpoint holds of each module, None when weights are made up.
    """

    dtype: torch.dtype
    device: torch.device
    max_len: int
    kernels: Kernels = field(default_factory=Kernels)
    backends: Backends = field(default_factory=Backends)
    count_experts: bool = False
    quant: QuantizationConfig | None = None
    stored: Mapping[str, Found] | None = None
    prefix: str = ""

    def at(self, name: str) -> Make:
        """The factory one level down: names made there start with `name`."""
        return replace(self, prefix=self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        part = Part(name=name, size=out_features)
        return self._linear([part], in_features, self._method(part, in_features), bias)

    def dense(self, name: str, in_features: int, out_features: int) -> Linear:
        """A matrix that its owner keeps in this run's dtype: rounding it while it is loaded would gain nothing."""
        part = Part(name=name, size=out_features)
        method, shape = self._method(part, in_features), LayerShape(in_features=in_features, parts=(part,))
        rounds = any(spec.fill is not None for spec in method.specs(shape, self.dtype).values())
        return self._linear([part], in_features, Unquantized() if rounds else method, bias=False)

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

    def either(self, *names: str, probe: str) -> Make:
        """The factory at whichever of `names` the checkpoint stores a module `probe` in; the first if in none."""
        return self.at(next((name for name in names if self.at(name).stores(probe)), names[0]))

    def stores(self, name: str) -> bool:
        """Whether the checkpoint has tensors of the module `name`."""
        return self.stored is not None and self._full(name) in self.stored

    def router(self, name: str, hidden: int, experts: int, routing: Routing, *, bias: str | None = None) -> Router:
        return Router(self._full(name), hidden, experts, routing, bias=bias, dtype=self.dtype, device=self.device)

    def experts(self, name: str, count: int, hidden: int, intermediate: int, *, top_k: int,
                parts: Sequence[tuple[str, str, str]]) -> Experts:
        """`count` experts at `name`; `parts` are the names that gate, up and down may have, the usual ones first."""
        here = self.at(name)
        gate, up, down = next((names for names in parts if here.at("0").stores(names[2])), parts[0])
        if stacked := is_stacked(here.prefix, found := (self.stored or {}).get(here.prefix, {})):
            shapes = {gate: (intermediate, hidden), up: (intermediate, hidden), down: (hidden, intermediate)}
            here = replace(here, stored=stored_apart(here.prefix, found, count, shapes))
        experts = [
            Expert(one.fused([(gate, intermediate), (up, intermediate)], hidden),
                   one.linear(down, intermediate, hidden))
            for one in (here.at(str(number)) for number in range(count))
        ]
        stacks = tuple(stacked_slots(here.prefix, experts, hidden, intermediate)) if stacked else ()
        return Experts(here.prefix, experts, hidden=hidden, intermediate=intermediate, top_k=top_k, dtype=self.dtype,
                       device=self.device, backends=self.backends, count=self.count_experts, stacks=stacks)

    def gate(self, name: str, in_features: int, out_features: int) -> Linear:
        """A small matrix that weighs what other layers give; like a router's, it is never quantized."""
        return self._linear([Part(name=name, size=out_features)], in_features, Unquantized(), bias=False)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self._full(name), size, eps, dtype=self.dtype, device=self.device)

    def embedding(self, name: str, vocab: int, size: int) -> Embedding:
        return Embedding(self._full(name), vocab, size, dtype=self.dtype, device=self.device)

    def rotary(self, config: RopeConfig, head_dim: int) -> Rotary:
        return Rotary(config, head_dim, self.max_len, dtype=self.dtype, device=self.device)
