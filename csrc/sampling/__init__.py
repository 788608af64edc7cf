"""The door of the sampling family: penalties, min-p, top-k, top-p, the draw, and its random numbers."""

from .reference import apply_min_p, apply_penalties, apply_top_k_top_p, draw
from .rng import stream_state, uniforms

__all__ = ["apply_min_p", "apply_penalties", "apply_top_k_top_p", "draw", "stream_state", "uniforms"]
