"""Codes of 2, 3, 4 or 8 bits packed into bytes so that a run of columns unpacks with one shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Widths of the planes a code is split into; each divides a byte.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes [R, K] uint8 -> one byte tensor [R, ceil(K * width / 8)] for each plane of `PLANES[bits]`, lowest first.

    Byte j of a plane with p codes to a byte holds the codes of columns j, j + W, ..., j + (p - 1) W, lowest first,
    where W is the plane's width in bytes: whole runs of columns come out of one mask and shift.
    """
    planes, first = [], 0
    for width in PLANES[bits]:
        part = (codes >> first) & ((1 << width) - 1)
        per_byte = 8 // width
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % per_byte)).unflatten(1, (per_byte, -1))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part << shifts[:, None]).sum(dim=1, dtype=torch.uint8))
        first += width
    return planes


def unpack(planes: Sequence[Tensor], bits: int, columns: int) -> Tensor:
    """What `pack` was given: uint8 [R, columns]."""
    codes: Tensor | None = None
    first = 0
    for plane, width in zip(planes, PLANES[bits]):
        part = plane
        if width < 8:
            mask = (1 << width) - 1
            runs = [(plane >> shift) & mask if shift + width < 8 else plane >> shift for shift in range(0, 8, width)]
            part = torch.cat(runs, dim=1)[:, :columns]
        codes = part if codes is None else codes | (part << first)
        first += width
    assert codes is not None
    return codes
