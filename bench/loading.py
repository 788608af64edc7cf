"""`nybble bench load`: weights from disk to a device, beside a plain read of the same files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..engine.args import setting
from ..engine.loader.safetensors_loader import fill
from ..engine.loader.scan import INDEX, Checkpoint, scan
from ..plugins.errors import UsageError
from ..quant import Slot
from ..quant.base import LayerShape, Part, Unquantized, part_slots
from ..quant.online import OnlineFp8Method
from .command import make_parser, pick, publish, read_settings, track
from .results import Metric, make_result

STORED = torch.bfloat16
SIZE = 4096
PLAIN_BYTES = 4 << 20
# What becomes of a stored matrix: its method, and the dtype of the layer.
CASES = {
    "copy": (Unquantized(), STORED),
    "convert": (Unquantized(), torch.float32),
    "fp8": (OnlineFp8Method.per_channel(), STORED),
}


@dataclass(frozen=True, kw_only=True)
class LoadArgs:
    """A made-up bfloat16 checkpoint of square matrices and norms. Cold: dropped from the page cache, as far as the
    system lets a user; a cache below it, of a disk or a network, is not."""

    gigabytes: float = setting(4.0, "size of the checkpoint", group="benchmark", above=0)
    shards: int = setting(4, "files", group="benchmark", low=1)
    folder: str | None = setting(None, "where it is written and removed again (default: the system's temporary "
                                 "folder)", group="benchmark")
    cases: str = setting("copy,fp8", f"of {', '.join(CASES)}, separated by commas: what becomes of the matrices",
                         group="benchmark")
    device: str = setting("cpu", "cpu or cuda", group="benchmark", choices=("cpu", "cuda"))
    repeats: int = setting(3, "loads of each kind", group="benchmark", low=1)


class Model:
    """As much of a model as a loader wants: slots, in memory on the device."""

    def __init__(self, stored: Mapping[str, tuple[int, ...]], case: str, device: torch.device) -> None:
        self.ignored_tensors: Mapping[str, str] = {}
        self._slots = [slot for name, shape in stored.items() for slot in _slots(name, shape, case, device)]

    def slots(self) -> Iterator[Slot]:
        return iter(self._slots)


def _slots(name: str, shape: tuple[int, ...], case: str, device: torch.device) -> Iterator[Slot]:
    method, dtype = CASES[case]
    if len(shape) == 1:
        yield Slot(name=name, target=torch.zeros(shape, dtype=dtype, device=device))
        return
    layer = LayerShape(in_features=shape[1], parts=(Part(name=name.removesuffix(".weight"), size=shape[0]),))
    specs = method.specs(layer, dtype)
    weights = {key: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()}
    yield from part_slots("", layer, specs, weights)


def main(argv: list[str]) -> int:
    parser = make_parser("load", LoadArgs, "Rate of loading a checkpoint, cold and warm, beside a plain read of it.")
    parsed = parser.parse(argv)
    args = read_settings(LoadArgs, parsed)
    cases = pick(args.cases, CASES, "case")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but there is no CUDA device", fix="leave --device out")
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="nybble-bench-", dir=args.folder) as name:
        checkpoint = write_checkpoint(Path(name), args)
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        for kind in track(["read", *cases], "load"):
            run = _run(kind, checkpoint, device)
            for heat in ("cold", "warm") * args.repeats:
                if heat == "cold":
                    drop_from_memory(checkpoint)
                start = time.perf_counter()
                run()
                samples.setdefault(f"{kind}/{heat}", []).append(size / 1e9 / (time.perf_counter() - start))
    metrics = {name: Metric.of(rates, "GB/s", better="higher") for name, rates in samples.items()}
    publish(make_result("load", argv, model=f"made-up-{args.gigabytes:g}-gb", toy_model=False, device=args.device,
                        workload=asdict(args), metrics=metrics), parsed.output_json)
    return 0


def _run(kind: str, checkpoint: Checkpoint, device: torch.device) -> Callable[[], object]:
    """What is timed: a plain read, or a load into memory that is there already."""
    if kind == "read":
        return lambda: plain_read(checkpoint)
    model = Model({name: info.shape for name, info in checkpoint.tensors.items()}, kind, device)

    def load() -> None:
        fill(model, checkpoint, progress=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return load


def write_checkpoint(folder: Path, args: LoadArgs) -> Checkpoint:
    """Shards of random weights, on the disk. Raises UsageError when it has no room for them."""
    pairs = max(args.shards, round(args.gigabytes * 1e9 / ((SIZE + 1) * SIZE * STORED.itemsize)))
    needed, free = pairs * (SIZE + 1) * SIZE * STORED.itemsize, shutil.disk_usage(folder).free
    if needed >= free:
        raise UsageError(f"a checkpoint of {needed / 1e9:.1f} GB has no room in {folder.parent}",
                         found=f"{free / 1e9:.1f} GB free", fix="give another --folder, or fewer --gigabytes")
    matrix, index = torch.randn(SIZE, SIZE).to(STORED), dict[str, str]()
    for shard in range(args.shards):
        file = f"model-{shard + 1:05}-of-{args.shards:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for pair in range(shard, pairs, args.shards):
            tensors |= {f"layers.{pair}.weight": matrix.clone(), f"norms.{pair}.weight": matrix[0].clone()}
        save_file(tensors, folder / file)
        with (folder / file).open("rb") as handle:
            os.fsync(handle.fileno())  # what is not on the disk yet cannot be dropped from memory
        index |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return scan(folder)


def drop_from_memory(checkpoint: Checkpoint) -> None:
    """Ask the system to forget the files' pages; it may keep some."""
    for file in checkpoint.files:
        with FileIO(file.path) as handle:
            if hasattr(os, "posix_fadvise"):  # macOS has none: cold is then as warm
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(checkpoint: Checkpoint) -> None:
    """Every byte of every file, one after another, into one buffer that stays in the processor's cache."""
    buffer = bytearray(PLAIN_BYTES)
    for file in checkpoint.files:
        with FileIO(file.path) as handle:
            while handle.readinto(buffer):
                pass
