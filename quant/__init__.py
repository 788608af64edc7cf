"""Quantization methods and the linear layers they act on; one method is one file."""

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Activation, Scheme
from .base import (
    FLOAT_SOURCES,
    REFERENCE,
    CodedMethod,
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
from .kv_scales import KVScales
from .linear import Linear, SplitLinear, shared_rounding
from .registry import get_quantization_config

__all__ = [
    "FLOAT_SOURCES",
    "REFERENCE",
    "Activation",
    "CodedMethod",
    "Found",
    "KVScales",
    "LayerShape",
    "Linear",
    "LinearMethod",
    "Part",
    "QuantizationConfig",
    "QuantizedMatrix",
    "Scheme",
    "Slot",
    "SplitLinear",
    "Stored",
    "TiledMethod",
    "Unquantized",
    "WeightSpec",
    "Weights",
    "get_quantization_config",
    "shared_rounding",
]
