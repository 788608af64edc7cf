"""The door of the norm and rotary family: RMSNorm, rotary embedding, gated SiLU."""

from .cpu import rms_norm_for, silu_mul_for
from .fused import fused_rms_norm, fused_silu_mul
from .reference import rms_norm, rotary, silu_mul

__all__ = ["fused_rms_norm", "fused_silu_mul", "rms_norm", "rms_norm_for", "rotary", "silu_mul", "silu_mul_for"]
