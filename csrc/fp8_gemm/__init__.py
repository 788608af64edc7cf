"""FP8 weights times FP8 inputs on Hopper's matrix instructions, scaled by token and channel."""

from .linear import BY_SHAPE, CutlassFp8Kernel, channel_scales, cutlass_missing, scheme_refusal, shape_refusal
from .many_rows import fits, multiply

__all__ = ["BY_SHAPE", "CutlassFp8Kernel", "channel_scales", "cutlass_missing", "fits", "multiply", "scheme_refusal",
           "shape_refusal"]
