"""FP8 and int8 weights times 8 or 16-bit inputs."""

from .linear import TritonScaledKernel, TritonWeightOnlyKernel

__all__ = ["TritonScaledKernel", "TritonWeightOnlyKernel"]
