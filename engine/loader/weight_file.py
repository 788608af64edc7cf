"""An open weight file, read in windows: whole rows of tensors that lie side by side, as many as a buffer holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from typing import NamedTuple

from torch import Tensor

from ...plugins.errors import CheckpointError
from ...quant.base import Slot
from .header import FileInfo, TensorInfo
from .ledger import TORCH_DTYPES
from .problems import Problem, refuse


class Rows(NamedTuple):
    """Rows [first, first + length) of a stored tensor (a scalar is one row), from byte `at` of a window on."""

    info: TensorInfo
    slot: Slot
    first: int
    length: int
    at: int

    def values(self, window: Tensor) -> Tensor:
        """The rows, in the dtype they are stored in, as a view of a window's bytes."""
        end = self.at + self.length * row_bytes(self.info)
        return window[self.at : end].view(TORCH_DTYPES[self.info.dtype]).view(self.length, *self.info.shape[1:])


class Window(NamedTuple):
    """Bytes [offset, offset + size) of a file, and whose rows they are."""

    offset: int
    size: int
    rows: Sequence[Rows]


def row_bytes(info: TensorInfo) -> int:
    return info.nbytes // _num_rows(info)


def _num_rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def windows(tensors: Iterable[tuple[TensorInfo, Slot]], size: int) -> Iterator[Window]:
    """Tensors of one file, by offset and none empty, cut into windows of at most `size` bytes; no row is larger.

    A window ends where the next tensor does not follow, or cannot be viewed in its type where it would lie.
    """
    rows: list[Rows] = []
    start = end = 0
    for info, slot in tensors:
        width, total, first = row_bytes(info), _num_rows(info), 0
        while first < total:
            offset = info.offset + first * width
            aligned = (offset - start) % TORCH_DTYPES[info.dtype].itemsize == 0
            if rows and not (offset == end and aligned and offset + width <= start + size):
                yield Window(start, end - start, rows)
                rows = []
            if not rows:
                start = offset
            count = min((start + size - offset) // width, total - first)
            rows.append(Rows(info, slot, first, count, offset - start))
            first, end = first + count, offset + count * width
    if rows:
        yield Window(start, end - start, rows)


class WeightFile:
    """An open weight file that must stay what it was when its header was read."""

    def __init__(self, handle: FileIO, file: FileInfo) -> None:
        self._handle, self._file = handle, file

    @classmethod
    @contextmanager
    def open(cls, file: FileInfo) -> Iterator[WeightFile]:
        """Raises CheckpointError when the file is not the one that was scanned, now or when the context ends."""
        try:
            handle = FileIO(file.path)
        except OSError as error:
            raise _changed(file, None, str(error)) from error
        with handle:
            opened = cls(handle, file)
            opened._check()
            yield opened
            opened._check()

    def read(self, window: Window, memory: Tensor) -> None:
        """Fill the first bytes of `memory` [uint8]. Raises CheckpointError naming the tensor that cannot be read."""
        view, done = memory[: window.size].numpy().data, 0
        self._handle.seek(window.offset)
        while done < window.size:
            try:
                count = self._handle.readinto(view[done:])
            except OSError as error:
                raise _changed(self._file, _name_at(window, done), str(error)) from error
            if not count:
                raise _changed(self._file, _name_at(window, done), f"its end at byte {self._handle.tell()}")
            done += count

    def _check(self) -> None:
        status = os.fstat(self._handle.fileno())
        if (status.st_size, status.st_mtime_ns) != (self._file.size, self._file.mtime_ns):
            raise _changed(self._file, None, f"{status.st_size} bytes, written since")


def _name_at(window: Window, done: int) -> str:
    """The tensor that byte `done` of a window belongs to."""
    return [rows.slot.name for rows in window.rows if rows.at <= done][-1]


def _changed(file: FileInfo, name: str | None, found: str) -> CheckpointError:
    problem = Problem(file.name, name, f"the {file.size} bytes whose header was read", found)
    return refuse("a weight file changed while it was loaded", [problem], fix="load again once it is whole")
