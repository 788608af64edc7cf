"""The two ceilings of a device, measured in the same run as what is compared with them: bytes and products a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SOURCE_BYTES = {"cuda": 2**30, "cpu": 2**27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
# Calls are timed on inputs that together exceed the cache this often, or they would measure the cache.
CACHE_TIMES = 4
CPU_CACHE = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Bytes a second through memory, read or written, and operations a second by kind of product."""

    bandwidth: float
    operations: dict[str, float]

    def seconds(self, moved: float, operations: float, kind: str) -> float:
        """The least time that `moved` bytes and `operations` (two for each multiply-add) can take."""
        return max(moved / self.bandwidth, operations / self.operations[kind])


def measure_floors(device: torch.device) -> Floors:
    """The faster of a large copy and a large sum, and large products of each type that the device has."""
    kind = device.type
    source = torch.empty(SOURCE_BYTES[kind], dtype=torch.uint8, device=device).random_()
    target, numbers = torch.empty_like(source), source.view(torch.float32)
    # What is timed mostly reads, and outruns what writes as much as it reads: 4.4 TB/s to a copy's 2.7 on an H200.
    moves: list[tuple[int, Callable[[], object]]] = [
        (2 * source.nbytes, lambda: target.copy_(source)), (source.nbytes, numbers.sum)]
    bandwidth = max(nbytes / statistics.median(time_calls([move], device)) for nbytes, move in moves)
    size = PRODUCT_SIZE[kind]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    products: dict[str, Callable[[], object]] = {"float": lambda: low @ lows}
    low, lows = a.bfloat16(), b.bfloat16()
    if kind == "cuda":
        fp8, fp8s, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        products["fp8_e4m3"] = lambda: torch._scaled_mm(fp8, fp8s, one, one, out_dtype=torch.bfloat16)
        codes, others = a.to(torch.int8), b.to(torch.int8).t()
        products["int8"] = lambda: torch._int_mm(codes, others)
    operations = {
        name: 2.0 * size**3 / statistics.median(time_calls([product], device)) for name, product in products.items()
    }
    for name in ("fp8_e4m3", "int8"):
        operations.setdefault(name, operations["float"])
    return Floors(bandwidth=bandwidth, operations=operations)


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` to rotate among, so that none is still in the cache when it comes again."""
    cache = CPU_CACHE if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-CACHE_TIMES * cache // nbytes))


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, *, samples: int = 15,
               graph: bool = True) -> list[float]:
    """Seconds a call, `samples` times: all `calls` one after another, on CUDA as a graph unless that is not wanted."""
    for call in calls:
        call()
    if device.type == "cpu":
        return [_wall(calls) for _ in range(samples)]
    torch.cuda.synchronize(device)
    replay = _captured(calls) if graph else lambda: _run(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 1
    seconds = []
    for sample in range(samples + 3):
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        taken = start.elapsed_time(end) / 1e3
        if sample < 3:  # warm-up: find how many replays take two milliseconds
            repeats = max(1, min(200, int(repeats * 2e-3 / max(taken, 1e-6))))
        else:
            seconds.append(taken / repeats / len(calls))
    return seconds


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            _run(calls)
    except RuntimeError:  # a capture that fails leaves its own stream behind as the current one
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        raise
    return graph.replay


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    _run(calls)
    return (time.perf_counter() - start) / len(calls)
