"""Quantization methods and the linear layers they act on; one method is one file."""

from .base import (
    FLOAT_SOURCES,
    Found,
    LayerShape,
    LinearMethod,
    Part,
    QuantizationConfig,
    Slot,
    Stored,
    TiledMethod,
    Unquantized,
    Weights,
    WeightSpec,
)
from .linear import Linear, SplitLinear
from .registry import get_quantization_config
from .scheme import Activation, Scheme

__all__ = [
    "FLOAT_SOURCES",
    "Activation",
    "Found",
    "LayerShape",
    "Linear",
    "LinearMethod",
    "Part",
    "QuantizationConfig",
    "Scheme",
    "Slot",
    "SplitLinear",
    "Stored",
    "TiledMethod",
    "Unquantized",
    "WeightSpec",
    "Weights",
    "get_quantization_config",
]
