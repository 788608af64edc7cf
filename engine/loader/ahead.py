"""Reading ahead: a thread fills one buffer while another is used, and none before the copies out of it are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Wait = Callable[[], object]
"""Returns once a copy has been made."""


class Buffer:
    """`size` bytes that files are read into; `pinned` ones a CUDA device copies in its own time."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._copies: deque[Wait] = deque()

    def take(self) -> Tensor:
        """The bytes, to be overwritten, once all copies of them are made."""
        while self._copies:
            self._copies.popleft()()
        return self._memory

    def lend(self, count: int, device: torch.device) -> Tensor:
        """The first `count` bytes for what is asked of `device` next: on CPU these bytes themselves, until `take`."""
        host = self._memory[:count]
        if device.type == "cpu":
            return host
        there, wait = self.copy(host, device)
        self._copies.append(wait)
        return there

    def copy(self, host: Tensor, device: torch.device) -> tuple[Tensor, Wait]:
        """Begin a copy to a device, in order with what its current stream does."""
        there = host.to(device, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # a wait that spins would take a core from who converts
        event.record(torch.cuda.current_stream(device))
        return there, event.synchronize


def ahead(steps: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """The items of `steps`, none of them None; a thread makes up to `count` more while the caller has one.

    With `count` + 1 buffers used in turn, none is written to while the caller has it; with 0 there is no thread. What
    `steps` raises is raised here, in its turn. At the end, however it comes, the thread is gone and `steps` is closed.
    """
    with closing(steps):
        if not count:
            yield from steps
            return
        with ThreadPoolExecutor(1, thread_name_prefix="nybble-read") as reader:
            waiting = deque(reader.submit(next, steps, None) for _ in range(count))
            try:
                while (item := waiting.popleft().result()) is not None:
                    waiting.append(reader.submit(next, steps, None))
                    yield item
            finally:
                reader.shutdown(cancel_futures=True)
