"""Quantization methods and the linear layers they act on; one method is one file."""

from .base import (
    FLOAT_SOURCES,
    LayerShape,
    LinearMethod,
    Part,
    QuantizationConfig,
    Slot,
    Unquantized,
    Weights,
    WeightSpec,
)
from .linear import Linear

__all__ = [
    "FLOAT_SOURCES",
    "LayerShape",
    "Linear",
    "LinearMethod",
    "Part",
    "QuantizationConfig",
    "Slot",
    "Unquantized",
    "WeightSpec",
    "Weights",
]
