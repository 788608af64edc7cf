"""Reading ahead: windows cover all, no buffer is overwritten before its copies are made, errors come through."""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nybble.engine.loader.ahead import Buffer, ahead
from nybble.engine.loader.header import DTYPES, TensorInfo
from nybble.engine.loader.ledger import TORCH_DTYPES
from nybble.engine.loader.safetensors_loader import Ring, fill
from nybble.engine.loader.scan import scan
from nybble.engine.loader.weight_file import FileIO, WeightFile, row_bytes, windows
from nybble.plugins.errors import CheckpointError
from nybble.quant.base import Slot


class Model:
    ignored_tensors: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, *slots: Slot) -> None:
        self._slots = slots

    def slots(self):
        yield from self._slots


class LateDevice:
    """Does what it is asked to in order, and as late as it may: when somebody waits for it."""

    def __init__(self) -> None:
        self.work: deque = deque()
        self.asked = self.done = 0

    def ask(self, work) -> int:
        self.work.append(work)
        self.asked += 1
        return self.asked

    def wait(self, number: int) -> None:
        while self.done < number:
            self.work.popleft()()
            self.done += 1


class LateBuffer(Buffer):
    """Copies to the late device, though slots say that they are on CPU."""

    def __init__(self, device: LateDevice, size: int) -> None:
        super().__init__(size)
        self.device = device

    def lend(self, count, device):
        return super().lend(count, torch.device("meta"))

    def copy(self, host, device):
        there = torch.full_like(host, 0xAB)
        number = self.device.ask(lambda: there.copy_(host))
        return there, lambda: self.device.wait(number)


class CarelessBuffer(LateBuffer):
    def take(self):
        return self._memory


def load_late(folder, stored, kind, ring_size, count):
    """Every tensor of `stored`, as the late device has it in the end; how much it still had to do when `fill` ended."""
    device, slots = LateDevice(), []

    def later(target, row, values):
        device.ask(lambda: target[row : row + len(values)].copy_(values))

    for name, values in stored.items():
        target = torch.zeros_like(values)
        slots.append(Slot(name=name, target=target, sources=(values.dtype,), fill=partial(later, target)))
    ring = Ring(size=ring_size, count=count, make=partial(kind, device))
    fill(Model(*slots), scan(folder), progress=False, ring=ring)
    left = [work for work in device.work if "host" in work.__code__.co_freevars]
    device.wait(device.asked)
    return {slot.name: slot.target for slot in slots}, len(left)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of two files, and what they hold: tensors of every width, most of them smaller than a window."""
    folder, generator = tmp_path_factory.mktemp("shards"), torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float16] * 6
    stored = {f"{i:02}": torch.rand(3 + 7 * (i % 5), 1 + i % 3, generator=generator).to(dtype)
              for i, dtype in enumerate(dtypes)}
    half = {name: value for name, value in stored.items() if int(name) % 2}
    save_file(half, folder / "a.safetensors")
    save_file({name: value for name, value in stored.items() if name not in half}, folder / "b.safetensors")
    return folder, stored


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 1500), count=st.integers(1, 4))
def test_no_buffer_is_overwritten_before_its_copies_are_made(shards, size, count):
    folder, stored = shards
    found, left = load_late(folder, stored, LateBuffer, size, count)
    assert all(torch.equal(found[name], values) for name, values in stored.items())
    assert not left, "the buffers were let go with copies out of them still to be made"


def test_a_buffer_that_does_not_wait_would_be_found_out(shards):
    folder, stored = shards
    found, left = load_late(folder, stored, CarelessBuffer, 100, 2)
    assert left and not all(torch.equal(found[name], values) for name, values in stored.items())


@st.composite
def files(draw):
    """Tensors of one file by offset, some with gaps before them, some where their type cannot be viewed."""
    tensors, offset = [], draw(st.integers(8, 24))
    for number in range(draw(st.integers(0, 12))):
        offset += draw(st.sampled_from([0, 0, 0, 1, 4, 8]))
        dtype = draw(st.sampled_from([name for name in TORCH_DTYPES if name != "BOOL"]))
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        nbytes = torch.Size(shape).numel() * DTYPES[dtype].bits // 8
        info = TensorInfo(file="f", dtype=dtype, shape=shape, offset=offset, nbytes=nbytes)
        tensors.append((info, Slot(name=str(number), target=torch.empty(shape))))
        offset += nbytes
    return tensors


@given(tensors=files(), extra=st.integers(0, 300))
def test_windows_cover_every_row_once_and_are_as_few_as_can_be(tensors, extra):
    size = max((row_bytes(info) for info, _ in tensors), default=1) + extra
    cut = list(windows(tensors, size))
    memory = torch.arange(size, dtype=torch.int32).to(torch.uint8)
    found = []
    for window in cut:
        assert 0 < window.size <= size
        for rows in window.rows:
            values = rows.values(memory[: window.size])
            assert values.shape == (rows.length, *rows.info.shape[1:])
            assert values.contiguous().view(-1).view(torch.uint8)[0] == rows.at % 256
            found += [(rows.slot.name, rows.first + i, window.offset + rows.at + i * row_bytes(rows.info))
                      for i in range(rows.length)]
    assert found == [(slot.name, row, info.offset + row * row_bytes(info)) for info, slot in tensors
                     for row in range(info.shape[0] if info.shape else 1)]
    for before, after in pairwise(cut):
        first = after.rows[0]
        follows = after.offset == before.offset + before.size
        aligned = before.size % TORCH_DTYPES[first.info.dtype].itemsize == 0
        assert not (follows and aligned and before.size + row_bytes(first.info) <= size), "one window would have done"


def test_small_tensors_are_read_at_once(tmp_path, monkeypatch):
    stored = {f"{i:03}": torch.full((2, 2), float(i)) for i in range(300)}
    save_file(stored, tmp_path / "model.safetensors")
    reads = []
    read = WeightFile.read
    monkeypatch.setattr(WeightFile, "read", lambda file, window, memory: (reads.append(window.size),
                                                                          read(file, window, memory)))
    slots = [Slot(name=name, target=torch.empty(2, 2)) for name in stored]
    fill(Model(*slots), scan(tmp_path), progress=False)
    assert reads == [300 * 16]
    assert all((slot.target == float(slot.name)).all() for slot in slots)


def test_the_next_is_made_while_the_caller_has_one_and_not_the_one_after():
    begun, threads = [threading.Event() for _ in range(4)], set()

    def steps():
        for number, event in enumerate(begun):
            event.set()
            threads.add(threading.current_thread())
            yield number

    for number in ahead(steps(), 1):
        if number < 3:
            assert begun[number + 1].wait(10)
        if number < 2:
            assert not begun[number + 2].wait(0.02)
    assert len(threads) == 1 and threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_without_a_buffer_to_spare_there_is_no_thread():
    threads = set()

    def steps():
        for number in range(3):
            threads.add(threading.current_thread())
            yield number

    assert list(ahead(steps(), 0)) == [0, 1, 2] and threads == {threading.current_thread()}


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nybble-read")]


@pytest.fixture
def four(tmp_path):
    """A folder of four tensors, each a window of 16 bytes."""
    save_file({name: torch.ones(2, 2) for name in "abcd"}, tmp_path / "model.safetensors")
    return tmp_path


class FailingFile(FileIO):
    """A disk that gives up in the third window."""

    def readinto(self, view):
        if self.tell() >= 2 * 16 + self.start:
            raise OSError(5, "Input/output error")
        return super().readinto(view)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_of_the_reading_thread_is_the_loaders(four, monkeypatch, count):
    checkpoint = scan(four)
    FailingFile.start = min(info.offset for info in checkpoint.tensors.values())
    monkeypatch.setattr("nybble.engine.loader.weight_file.FileIO", FailingFile)
    slots = [Slot(name=name, target=torch.zeros(2, 2)) for name in "abcd"]
    with pytest.raises(CheckpointError, match=r"model.safetensors: c: expected .* found .*Input/output error"):
        fill(Model(*slots), checkpoint, progress=False, ring=Ring(size=16, count=count))
    assert [bool(slot.target.all()) for slot in slots] == [True, True, False, False]
    assert not readers()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_of_a_slot_ends_the_reading_thread_and_closes_the_file(four, monkeypatch, count):
    opened = []

    class Watched(FileIO):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    def refuse(row, values):
        raise CheckpointError("a scale is NaN")

    monkeypatch.setattr("nybble.engine.loader.weight_file.FileIO", Watched)
    slots = [Slot(name=name, target=torch.zeros(2, 2), fill=refuse if name == "b" else None) for name in "abcd"]
    with pytest.raises(CheckpointError, match="a scale is NaN"):
        fill(Model(*slots), scan(four), progress=False, ring=Ring(size=16, count=count))
    assert not readers() and [file.closed for file in opened] == [True]


@pytest.mark.gpu
def test_pinned_buffers_of_cuda(shards):
    folder, stored = shards
    for size in (64, 1 << 20):
        slots = [Slot(name=name, target=torch.zeros_like(values, device="cuda", dtype=torch.float32),
                      sources=(values.dtype,)) for name, values in stored.items()]
        fill(Model(*slots), scan(folder), progress=False,
             ring=Ring(size=size, count=2, make=partial(Buffer, pinned=True)))
        assert all(torch.equal(slot.target.cpu(), stored[slot.name].float()) for slot in slots)
