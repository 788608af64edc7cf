"""The door of the norm and rotary family: RMSNorm, rotary embedding, gated SiLU."""

from .reference import rms_norm, rotary, silu_mul

__all__ = ["rms_norm", "rotary", "silu_mul"]
