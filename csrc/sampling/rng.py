"""Random numbers as a pure function of (seed, stream, position): nothing to advance, save, move or restore.

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) is a finalizer
over a counter, so it can be entered at any position:

    state(seed, stream)       = mix(seed + GAMMA * (stream + 1))
    bits(state, position)     = mix(state + GAMMA * (position + 1))
    uniform                   = top 53 bits / 2**53

A token therefore depends on its request's seed and its own place in the output, whatever was batched,
chunked, preempted or recomputed in between.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.integer]

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(x: Words) -> Words:
    """SplitMix64's finalizer, a bijection of 64-bit words; arithmetic wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_state(seed: int, stream: int = 0) -> int:
    """Where a seed's numbers begin. Any int is a seed, mod 2**64; `stream` separates uses, 0 draws tokens."""
    return int(mix(np.array([(seed + GAMMA * (stream + 1)) & MASK], dtype=np.uint64))[0])


def uniforms(states: Words, positions: Positions) -> npt.NDArray[np.float64]:
    """[R] numbers in [0, 1): `states` [R] are from `stream_state`, `positions` [R] count from 0."""
    step = positions.astype(np.uint64) + np.uint64(1)
    bits = mix(states + step * np.uint64(GAMMA)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
