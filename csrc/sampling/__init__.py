"""The door of the sampling family: the likeliest token, penalties, min-p, top-k, top-p, the draw, random numbers."""

from .pending import take_pending
from .reference import apply_min_p, apply_penalties, apply_top_k_top_p, draw, likeliest
from .rng import stream_state, uniforms

__all__ = ["apply_min_p", "apply_penalties", "apply_top_k_top_p", "draw", "likeliest", "stream_state",
           "take_pending", "uniforms"]
