"""Tokens that the host has not seen yet: ids that stand for what the step before has sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import early


def take_pending(ids: Tensor, sampled: Tensor) -> Tensor:
    """ids [T] int64 with every id below 0 replaced by sampled[-1 - id], in place; `sampled` [S] int64."""
    if ids.device.type == "cuda":
        from .triton_pending import BLOCK, take_pending_kernel

        take_pending_kernel[(-(-len(ids) // BLOCK),)](ids, sampled, len(ids), BLOCK=BLOCK, **early(ids.device))
        return ids
    return ids.copy_(torch.where(ids < 0, sampled[(-1 - ids).clamp_(min=0)], ids))
