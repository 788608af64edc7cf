"""FP8 weights times FP8 inputs on Hopper's matrix instructions, scaled by token and channel."""

from .linear import CutlassFp8Kernel, channel_scales, cutlass_missing, scheme_refusal, shape_refusal

__all__ = ["CutlassFp8Kernel", "channel_scales", "cutlass_missing", "scheme_refusal", "shape_refusal"]
