"""What is asked of a device when its KV cache is measured out: the peak of a stretch of work, and what is in use."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Room(NamedTuple):
    """Bytes of a device: in use by any process, and all there are."""

    used: int
    total: int


class DeviceMemory(Protocol):
    """A device whose memory this process's allocator accounts for."""

    def begin(self) -> None:
        """Forget earlier peaks: what is allocated now is where `peak` counts from."""

    def peak(self) -> int:
        """Bytes that were allocated at most since `begin`, beyond those that were then."""

    def room(self) -> Room:
        """What is in use once the allocator has given back what it only keeps."""


class CudaMemory:
    """A CUDA device, by torch's caching allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, 0

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._held

    def room(self) -> Room:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return Room(used=total - free, total=total)
