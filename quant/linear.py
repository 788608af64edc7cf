"""The one linear layer: fused parts declared by the model, storage and arithmetic given by a LinearMethod."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .base import FLOAT_SOURCES, LayerShape, LinearMethod, Slot, WeightSpec, part_slots


class Linear(nn.Module):
    """y = x W^T + b over one or several fused parts.

    Args:
        prefix: checkpoint name of the parent module ("model.layers.0.self_attn").
        shape: input size and the fused parts in order.
        method: how the matrix is stored and applied.
        dtype: of activations, bias and unquantized weights.

    Weights are allocated uninitialised; a loader fills every slot or refuses.
    """

    def __init__(self, prefix: str, shape: LayerShape, method: LinearMethod, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__()
        self.prefix, self.shape, self.method = prefix, shape, method
        self.specs = method.specs(shape, dtype)
        self.weights = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in self.specs.items()
        }
        self.bias = torch.empty(shape.out_features, dtype=dtype, device=device) if shape.bias else None

    def slots(self) -> Iterator[Slot]:
        yield from part_slots(self.prefix, self.shape, self.specs, self.weights)
        if self.bias is not None:
            spec = WeightSpec(shape=tuple(self.bias.shape), dtype=self.bias.dtype, sources=FLOAT_SOURCES)
            yield from part_slots(self.prefix, self.shape, {"bias": spec}, {"bias": self.bias})

    def after_load(self) -> None:
        self.weights = self.method.after_load(self.weights, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self.weights, x, self.bias)

    def extra_repr(self) -> str:
        parts = "+".join(f"{p.name}:{p.size}" for p in self.shape.parts)
        return f"{self.shape.in_features} -> {parts}, {type(self.method).__name__}"


class SplitLinear(nn.Module):
    """Parts of one input that are stored in different ways, side by side; the outputs are joined in order."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
