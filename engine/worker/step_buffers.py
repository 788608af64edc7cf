"""What one step sends to the device: fixed memory on both sides, filled anew each step and sent in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Triton has another kernel for an address that is not a multiple of it.
ALIGNMENT = 16


class Mirror(NamedTuple):
    """An array on the host and its twin on the device; on CPU they are one memory."""

    host: np.ndarray
    device: Tensor


class StepInputs(NamedTuple):
    """A step of T tokens in R requests, as views of the buffers.

    ids, positions, slots: [T] int64; an id below 0 stands for token -1 - id of the step before (`take_pending`).
    last: [R] int64, of which the first S are the tokens that logits are made of.
    query_start: [R + 1] int32. seq_lens: [R] int32.
    """

    ids: Mirror
    positions: Mirror
    slots: Mirror
    last: Mirror
    query_start: Mirror
    seq_lens: Mirror
    num_bytes: int


class StepBuffers:
    """The memory behind every step's `StepInputs`: they lie side by side from its start, whatever their sizes."""

    def __init__(self, *, max_tokens: int, max_rows: int, device: torch.device) -> None:
        size = 8 * (3 * max_tokens + max_rows) + 4 * (2 * max_rows + 1) + len(StepInputs._fields) * ALIGNMENT
        cuda = device.type == "cuda"
        self._pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
        self._host = self._pinned.numpy()
        self._device = torch.zeros(size, dtype=torch.uint8, device=device) if cuda else self._pinned

    def lay_out(self, tokens: int, rows: int) -> StepInputs:
        """Views for a step of `tokens` tokens in `rows` requests; the same sizes give the same addresses."""
        at, mirrors = 0, []
        for count, dtype in ((tokens, torch.int64), (tokens, torch.int64), (tokens, torch.int64), (rows, torch.int64),
                             (rows + 1, torch.int32), (rows, torch.int32)):
            end = at + count * dtype.itemsize
            device = self._device[at:end].view(dtype)
            mirrors.append(Mirror(self._host[at:end].view(np.int64 if dtype is torch.int64 else np.int32), device))
            at = -(-end // ALIGNMENT) * ALIGNMENT
        ids, positions, slots, last, query_start, seq_lens = mirrors
        return StepInputs(ids, positions, slots, last, query_start, seq_lens, at)

    def push(self, inputs: StepInputs) -> None:
        """Send a step's inputs. The host's side may be overwritten once the device has passed this point."""
        if self._device is not self._pinned:
            self._device[: inputs.num_bytes].copy_(self._pinned[: inputs.num_bytes], non_blocking=True)
