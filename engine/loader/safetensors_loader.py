"""Load safetensors files: checked whole by the ledger, then streamed into place through one or two buffers.

Files are read, not mapped: a file that shrinks under a mapping kills the process with a SIGBUS that nothing
can catch (NVIDIA/TensorRT-LLM#17368), and page faults over a network are tens of times slower (ComfyUI#2288).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby
from pathlib import Path

import torch
from torch import Tensor

from ...plugins.log import get_logger
from ...quant.base import Slot
from .ahead import Buffer, ahead
from .base import LoadableModel, LoadReport, WeightLoader
from .header import TensorInfo
from .ledger import Ledger, Uses
from .problems import Problem, refuse
from .progress import Advance, byte_progress
from .scan import Checkpoint, scan
from .weight_file import WeightFile, Window, row_bytes, windows

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The buffers that weights pass through in turn: while one is in use, a thread reads into the others.

    `size` is in bytes; tensors with longer rows have buffers of a row. `make` gives a buffer of a size.
    """

    size: int
    count: int
    make: Callable[[int], Buffer] = Buffer


# Small enough to stay in the processor's cache between read and copy: 9 GB/s where 64 MiB gives 4. And one, read by the
# core that copies: two in turn, and a thread, gave 4 GB/s where this gave 9, and cold files come no faster by them.
HOST = Ring(size=4 << 20, count=1)
# One is read while the other is on its way. At the 50 GB/s of PCIe 5 a copy takes 0.7 ms, beside which the tens of
# microseconds to begin it and to wake the reader are little; larger ones would only be longer to pin.
CUDA = Ring(size=32 << 20, count=2, make=partial(Buffer, pinned=True))


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


def fill(model: LoadableModel, checkpoint: Checkpoint, *, progress: bool, ring: Ring | None = None) -> tuple[Uses, int]:
    """Fill every slot of a model, or of a part of one, from a scanned checkpoint; what was used, and bytes read.

    `ring` is chosen by where the slots are. Raises CheckpointError as `WeightLoader.load`.
    """
    ledger = Ledger(model.slots(), model.ignored_tensors)
    uses = ledger.match(checkpoint)
    if ring is None:
        ring = CUDA if any(slot.target.is_cuda for slot in ledger.slots.values()) else HOST
    total = sum(checkpoint.tensors[name].nbytes for name in (*uses.loaded, *uses.tied))
    with torch.no_grad(), byte_progress("loading weights", total, enabled=progress) as advance:
        with closing(_pieces(checkpoint, ledger, uses.loaded, ring, advance)) as pieces:
            for slot, row, values in pieces:
                slot.put(row, values)
                del values  # a copy on a device goes before the next one is made
        _check_tied(checkpoint, ledger, uses.tied, ring, advance)
    return uses, total


def _check_tied(checkpoint: Checkpoint, ledger: Ledger, names: Sequence[str], ring: Ring, advance: Advance) -> None:
    """Compare stored copies of tied weights with what was loaded. Raises CheckpointError when one differs."""
    differing: Counter[str] = Counter()
    with closing(_pieces(checkpoint, ledger, names, ring, advance)) as pieces:
        for slot, row, values in pieces:
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
    checkpoint: Checkpoint, ledger: Ledger, names: Sequence[str], ring: Ring, advance: Advance
) -> Generator[tuple[Slot, int, Tensor], None, None]:
    """Stored values of `names` as (slot, first row, rows), file by file in offset order, on the slot's device.

    On CPU the rows are only lent: they lie in a buffer that the next window overwrites. On CUDA they are a copy, which
    may still be under way; all are made when this ends.
    """
    pairs = [(checkpoint.tensors[name], ledger.slots[name]) for name in names]
    longest = max((row_bytes(info) for info, _ in pairs if info.nbytes), default=0)
    if not longest:
        return
    size = max(ring.size, longest)
    buffers = [ring.make(size) for _ in range(ring.count)]
    reading = _windows(checkpoint, pairs, buffers, size)
    with closing(ahead(reading, ring.count - 1)) as filled:
        for window, buffer in filled:
            there: dict[torch.device, Tensor] = {}
            for rows in window.rows:
                device = rows.slot.target.device
                if device not in there:
                    there[device] = buffer.lend(window.size, device)
                yield rows.slot, rows.first, rows.values(there[device])
                advance(rows.length * row_bytes(rows.info))
            there.clear()
    for buffer in buffers:
        buffer.take()


def _windows(
    checkpoint: Checkpoint, pairs: Sequence[tuple[TensorInfo, Slot]], buffers: Sequence[Buffer], size: int
) -> Generator[tuple[Window, Buffer], None, None]:
    """Every window, each read into the next buffer."""
    order = sorted((pair for pair in pairs if pair[0].nbytes), key=lambda pair: (pair[0].file, pair[0].offset))
    files, turn = {file.name: file for file in checkpoint.files}, cycle(buffers)
    for name, group in groupby(order, key=lambda pair: pair[0].file):
        with WeightFile.open(files[name]) as file:
            for window in windows(group, size):
                buffer = next(turn)
                file.read(window, buffer.take())
                yield window, buffer


def _rows(target: Tensor) -> Tensor:
    """`target` with a first dimension to count rows in, which a scalar has not."""
    return target.view(1) if target.ndim == 0 else target
