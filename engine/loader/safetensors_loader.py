"""Load safetensors files: checked whole by the ledger, then streamed into place through one small buffer.

Files are read, not mapped: a file that shrinks under a mapping kills the process with a SIGBUS that nothing
can catch (NVIDIA/TensorRT-LLM#17368), and page faults over a network are tens of times slower (ComfyUI#2288).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ...plugins.errors import CheckpointError
from ...plugins.log import get_logger
from ...quant.base import Slot
from .base import LoadableModel, LoadReport, WeightLoader
from .header import FileInfo, TensorInfo
from .ledger import TORCH_DTYPES, Ledger, Uses
from .problems import Problem, refuse
from .progress import Advance, byte_progress
from .scan import Checkpoint, scan

# Small enough to stay in the processor's cache between read and copy: 9 GB/s where 64 MiB gives 4.
BUFFER_BYTES = 4 << 20

log = get_logger(__name__)


class SafetensorsLoader(WeightLoader):
    """Weights from `*.safetensors`, one file or many."""

    def load(self, model: LoadableModel, source: Path, *, seed: int, progress: bool) -> LoadReport:
        start = time.perf_counter()
        checkpoint = scan(source)
        if checkpoint.unused:
            log.warning("%s: not loaded, since nothing refers to them: %s", source, ", ".join(checkpoint.unused))
        uses, total = fill(model, checkpoint, progress=progress)
        return LoadReport(
            loaded=uses.loaded, derived=uses.derived, defaulted=uses.defaulted, ignored=uses.ignored,
            bytes_read=total, seconds=time.perf_counter() - start,
            files=tuple(file.name for file in checkpoint.files),
        )


def fill(model: LoadableModel, checkpoint: Checkpoint, *, progress: bool) -> tuple[Uses, int]:
    """Fill every slot of a model, or of a part of one, from a scanned checkpoint; what was used, and bytes read.

    Raises CheckpointError as `WeightLoader.load`.
    """
    ledger = Ledger(model.slots(), model.ignored_tensors)
    uses = ledger.match(checkpoint)
    total = sum(checkpoint.tensors[name].nbytes for name in (*uses.loaded, *uses.tied))
    with torch.no_grad(), byte_progress("loading weights", total, enabled=progress) as advance:
        for slot, row, values in _pieces(checkpoint, ledger, uses.loaded, advance):
            slot.put(row, values)
        _check_tied(checkpoint, ledger, uses.tied, advance)
    return uses, total


def _check_tied(checkpoint: Checkpoint, ledger: Ledger, names: Sequence[str], advance: Advance) -> None:
    """Compare stored copies of tied weights with what was loaded. Raises CheckpointError when one differs."""
    differing: Counter[str] = Counter()
    for slot, row, values in _pieces(checkpoint, ledger, names, advance):
        loaded = _rows(slot.target).narrow(0, row, len(values))
        differing[slot.name] += int((loaded.float() != values.to(loaded).float()).sum())
    owners = {slot.target.data_ptr(): slot.name for slot in ledger.slots.values() if not slot.alias}
    problems = []
    for name, count in differing.items():
        if count:
            target = ledger.slots[name].target
            expected = f"the values of {owners.get(target.data_ptr(), 'the weight')}, to which it is tied"
            found = f"{count} of {target.numel()} different"
            problems.append(Problem(checkpoint.tensors[name].file, name, expected, found))
    if problems:
        raise refuse(f"tied weights of {checkpoint.folder} differ", problems,
                     fix="set tie_word_embeddings to false in config.json if they are meant to")


def _pieces(
    checkpoint: Checkpoint, ledger: Ledger, names: Iterable[str], advance: Advance
) -> Iterator[tuple[Slot, int, Tensor]]:
    """Stored values of `names` as (slot, first row, rows), file by file in offset order.

    The rows lie in a buffer that the next piece overwrites; it holds at least one row of every tensor.
    """
    pairs = [(checkpoint.tensors[name], ledger.slots[name]) for name in names]
    pairs = sorted((p for p in pairs if p[0].nbytes), key=lambda p: (p[0].file, p[0].offset))
    size = max((info.nbytes // _num_rows(info) for info, _ in pairs), default=0)
    pinned = any(slot.target.is_cuda for _, slot in pairs)
    buffer = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
    files = {file.name: file for file in checkpoint.files}
    for name, group in groupby(pairs, key=lambda p: p[0].file):
        with _Reader.open(files[name]) as reader:
            for info, slot in group:
                for row, values in reader.rows(info, slot.name, buffer):
                    yield slot, row, values
                    advance(values.nbytes)


def _rows(target: Tensor) -> Tensor:
    """`target` with a first dimension to count rows in, which a scalar has not."""
    return target.view(1) if target.ndim == 0 else target


def _num_rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


class _Reader:
    """An open weight file that must stay what it was when its header was read."""

    def __init__(self, handle: FileIO, file: FileInfo) -> None:
        self._handle, self._file = handle, file

    @classmethod
    @contextmanager
    def open(cls, file: FileInfo) -> Iterator[_Reader]:
        try:
            handle = FileIO(file.path)
        except OSError as error:
            raise _changed(file, None, str(error)) from error
        with handle:
            reader = cls(handle, file)
            reader._check()
            yield reader
            reader._check()

    def rows(self, info: TensorInfo, name: str, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The tensor as (first row, as many rows as `buffer` holds), each overwriting the one before."""
        total = _num_rows(info)
        row_bytes = info.nbytes // total
        step = len(buffer) // row_bytes
        self._handle.seek(info.offset)
        for row in range(0, total, step):
            count = min(step, total - row)
            part = buffer[: count * row_bytes]
            self._fill(part.numpy().data, name)
            yield row, part.view(TORCH_DTYPES[info.dtype]).view(count, *info.shape[1:])

    def _fill(self, window: memoryview, name: str) -> None:
        while window:
            try:
                count = self._handle.readinto(window)
            except OSError as error:
                raise _changed(self._file, name, str(error)) from error
            if not count:
                raise _changed(self._file, name, f"its end at byte {self._handle.tell()}")
            window = window[count:]

    def _check(self) -> None:
        status = os.fstat(self._handle.fileno())
        if (status.st_size, status.st_mtime_ns) != (self._file.size, self._file.mtime_ns):
            raise _changed(self._file, None, f"{status.st_size} bytes, written since")


def _changed(file: FileInfo, name: str | None, found: str) -> CheckpointError:
    problem = Problem(file.name, name, f"the {file.size} bytes whose header was read", found)
    return refuse("a weight file changed while it was loaded", [problem], fix="load again once it is whole")
