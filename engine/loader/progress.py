"""How far a load is, in bytes: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...plugins.log import get_logger

LINE_SECONDS = 10.0

Advance = Callable[[int], None]
"""Told of each so many bytes that are done."""


@contextmanager
def byte_progress(label: str, total: int, *, enabled: bool) -> Iterator[Advance]:
    """Show progress towards `total` bytes on stderr while the context lasts, if `enabled`."""
    if not enabled:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield Lines(label, total)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


class Lines:
    """Progress as log lines; quiet when the whole takes less than `LINE_SECONDS`.

    `clock` gives seconds of a monotonic clock.
    """

    def __init__(self, label: str, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._done = 0
        self._start = self._spoke = clock()

    def __call__(self, done: int) -> None:
        self._done += done
        now = self._clock()
        if now - self._spoke < LINE_SECONDS:
            return
        self._spoke = now
        get_logger(__name__).info(
            "%s: %.2f of %.2f GB, %.2f GB/s", self._label, self._done / 1e9, self._total / 1e9,
            self._done / 1e9 / (now - self._start),
        )
