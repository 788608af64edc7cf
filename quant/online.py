"""OnlineFp8Method: a floating point matrix that becomes FP8 while it is loaded, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..csrc.quantize import quantize
from ..csrc.scheme import Activation
from .base import FLOAT_SOURCES, LayerShape, Weights, WeightSpec
from .scaled import ScaledMethod, StoredScale

# A row is rounded as a token is: by the largest of its values.
ROW = Activation(dtype="fp8_e4m3", scale="token")


@dataclass(frozen=True, kw_only=True)
class OnlineFp8Method(ScaledMethod):
    """FP8 weights with a scale for each row, inputs rounded per token; what is stored is a plain `weight` [N, K].

    Rows are rounded as they are read, so that the matrix is never in memory in 16 bits.
    """

    @classmethod
    def per_channel(cls) -> OnlineFp8Method:
        return cls(code="fp8_e4m3", per="channel", scale=StoredScale("weight_scale", 2), activation=ROW)

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        rows, columns = shape.out_features, shape.in_features
        return {
            "weight": WeightSpec(shape=(rows, columns), dtype=torch.float8_e4m3fn, sources=FLOAT_SOURCES, fill=_fill),
            "weight_scale": WeightSpec(shape=(rows, 1), dtype=torch.float32, stored=False),
        }


def _fill(weights: Weights, row: int, values: Tensor) -> None:
    """Round `values` into rows [row, row + len(values))."""
    codes, scales = quantize(values.to(weights["weight"].device), ROW)
    weights["weight"][row : row + len(values)] = codes
    weights["weight_scale"][row : row + len(values)] = scales
