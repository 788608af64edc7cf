"""`--load-format dummy`: made-up weights that give sane activations, for tests without a download."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor

from ...quant.base import Slot
from .base import LoadableModel, LoadReport, WeightLoader
from .progress import byte_progress

SCALE = 0.01
BIAS_STD = 0.02


class DummyLoader(WeightLoader):
    """Seeded random weights; a tensor's values depend on seed, name and kind of device, never on order."""

    def load(self, model: LoadableModel, source: Path, *, seed: int, progress: bool) -> LoadReport:
        start = time.perf_counter()
        slots = list(model.slots())
        filled = [slot for slot in slots if not (slot.alias or slot.optional)]
        total = sum(slot.target.nbytes for slot in filled)
        with torch.no_grad(), byte_progress("making up weights", total, enabled=progress) as advance:
            for slot in filled:
                values = _values(slot, seed)
                slot.put(0, values.view(1) if values.ndim == 0 else values)
                advance(slot.target.nbytes)
        return LoadReport(
            loaded=tuple(slot.name for slot in filled),
            derived=tuple(slot.name for slot in slots if slot.alias),
            defaulted=tuple(slot.name for slot in slots if slot.optional and not slot.alias),
            ignored=(), bytes_read=0, seconds=time.perf_counter() - start, files=(),
        )


def _values(slot: Slot, seed: int) -> Tensor:
    """Values for one slot, on its device, in its shape.

    Floats in float32: norm gains are 1; scales of quantized weights a small constant, since a random one may
    be negative or zero; biases and other vectors N(0, 0.02); matrices N(0, 1/sqrt(fan_in)). Integers in their
    own type: packed codes cover the whole range; vectors are indices or shapes, where only 0 is always valid.
    """
    shape, dtype, device = slot.target.shape, slot.target.dtype, slot.target.device
    kind, is_vector = slot.name.rpartition(".")[2], slot.target.ndim < 2
    digest = hashlib.sha256(f"{seed}:{slot.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    if not dtype.is_floating_point:
        if is_vector:
            return torch.zeros(shape, dtype=dtype, device=device)
        size = (*shape[:-1], shape[-1] * dtype.itemsize)
        return torch.randint(256, size, dtype=torch.uint8, device=device, generator=generator).view(dtype)
    if "scale" in kind:
        return torch.full(shape, SCALE, device=device)
    if is_vector and kind == "weight":
        return torch.ones(shape, device=device)
    std = BIAS_STD if is_vector else shape[-1] ** -0.5
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator) * std
