"""Signal over quantization noise: summed powers in, decibels out."""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor

ROWS = 1024  # compared at a time: bounds the float64 copies


class Sqnr(msgspec.Struct, frozen=True, kw_only=True):
    """10 log10(|reference|^2 / |reference - found|^2).

    Attributes:
        signal: |reference|^2. noise: |reference - found|^2; None where the difference is not finite.
        db: the ratio in decibels; None where it is infinite, which `exact` and `broken` tell apart.
    """

    signal: float
    noise: float | None
    db: float | None

    @property
    def exact(self) -> bool:
        """No difference at all: infinitely many decibels."""
        return self.noise == 0

    @property
    def broken(self) -> bool:
        """NaN or infinite values, or noise where the reference is silent."""
        return self.db is None and not self.exact

    @property
    def level(self) -> float:
        """The decibels with their infinities: inf where exact, -inf where broken."""
        return self.db if self.db is not None else math.inf if self.exact else -math.inf

    def __str__(self) -> str:
        return f"{self.level:.1f} dB"


class Noise:
    """Adds up the powers of a signal and of its noise, in float64."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Two tensors of one shape [R, ...]; any floating point dtype, one device."""
        for want, got in zip(reference.split(ROWS), found.split(ROWS)):
            want = want.double()
            self._signal += float(want.square().sum())
            self._noise += float((want - got.double()).square().sum())

    def result(self) -> Sqnr:
        """What was added so far."""
        signal, noise = self._signal, self._noise
        if not math.isfinite(noise) or not math.isfinite(signal):
            return Sqnr(signal=signal if math.isfinite(signal) else 0.0, noise=None, db=None)
        return Sqnr(signal=signal, noise=noise, db=10 * math.log10(signal / noise) if signal and noise else None)


def sqnr(reference: Tensor, found: Tensor) -> Sqnr:
    """Of two matrices [R, C]."""
    noise = Noise()
    with torch.inference_mode():
        noise.add(reference, found)
    return noise.result()
