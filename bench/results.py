"""The one result schema of all benchmarks: what was measured, on what, by which command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from ..engine._version import __version__
from ..engine.cli.env import describe
from ..plugins.errors import UsageError

SCHEMA = 1
GIT_SECONDS = 10
WIDE = 200
"""Columns of a table, whatever the terminal: a metric's name must not be cut."""
Better = Literal["higher", "lower"]


class Metric(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measured quantity over `n` samples; `percentiles` are numpy's linear ones, by their number."""

    median: float
    min: float
    max: float
    n: int
    unit: str
    better: Better
    percentiles: dict[str, float] = {}

    @classmethod
    def of(cls, values: Sequence[float], unit: str, *, better: Better, percentiles: Sequence[float] = ()) -> Metric:
        """Summarize at least one finite sample."""
        assert len(values) and np.isfinite(values).all(), f"no metric can be made of {values}"
        return cls(
            median=float(np.median(values)),
            min=float(min(values)),
            max=float(max(values)),
            n=len(values),
            unit=unit,
            better=better,
            percentiles={f"{p:g}": float(np.percentile(values, p)) for p in percentiles},
        )


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran. `threads` are torch's, None without torch; `gpu` is None when it ran on the CPU."""

    cpu: str
    cores: int
    threads: int | None
    gpu: str | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark run. Files may hold further keys beside these (`bench serve` adds vLLM's).

    Attributes:
        date: ISO 8601, UTC.
        commit: of the checkout it ran from, "-dirty" with changes; None outside one.
        load_average: of the machine over the minute before the end; more than it has cores means a noisy run.
        toy_model: a model made for tests; its numbers say nothing of a real one.
        workload: the benchmark's own settings.
    """

    schema: int
    name: str
    date: str
    device: Device
    torch: str
    python: str
    nybble: str
    commit: str | None
    command: str
    model: str
    toy_model: bool
    load_average: float
    workload: dict[str, Any]
    metrics: dict[str, Metric]


def make_result(
    name: str,
    argv: Sequence[str],
    *,
    model: str,
    toy_model: bool,
    device: str,
    workload: Mapping[str, Any],
    metrics: Mapping[str, Metric],
) -> Result:
    """Stamp metrics with the environment; `device` is torch's name, `argv` the words after `bench NAME`."""
    return Result(
        schema=SCHEMA,
        name=name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=describe_device(device),
        torch=metadata.version("torch"),
        python=platform.python_version(),
        nybble=__version__,
        commit=_commit(Path(__file__).resolve().parents[1]),
        command=shlex.join(["nybble", "bench", name, *argv]),
        model=model,
        toy_model=toy_model,
        load_average=round(os.getloadavg()[0], 2),
        workload=dict(workload),
        metrics=dict(metrics),
    )


def describe_device(device: str) -> Device:
    """The machine as a result tells of it; `device` is torch's name."""
    found = describe()
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    gpus = list(found["gpus"].values())
    index = int(device.partition(":")[2] or 0)
    gpu = (gpus[index] if index < len(gpus) else device) if device.startswith("cuda") else None
    return Device(cpu=_cpu_name(), cores=found["cpus"], threads=threads, gpu=gpu)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or no commit yet


def write_json(path: Path, result: Result, extra: Mapping[str, Any] | None = None) -> None:
    """Write a result, with `extra` keys beside its own. Raises UsageError when the file cannot be written."""
    content = {**(extra or {}), **msgspec.to_builtins(result)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write the result to {path}", found=error) from error


def read_json(path: Path) -> Result:
    """A result file. Raises UsageError when it is none, or of another schema."""
    try:
        data = msgspec.json.decode(path.read_bytes())
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise UsageError(f"{path} is not a result of this version", found=f"schema {schema}", known=[str(SCHEMA)])
        return msgspec.convert(data, Result)
    except OSError as error:
        raise UsageError(f"cannot read {path}", found=error) from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} is not a benchmark result", found=error) from error


def print_result(result: Result) -> None:
    """The table, under what it was measured on."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(p for metric in result.metrics.values() for p in metric.percentiles))
    table = Table("metric", box=None, pad_edge=False)
    for title in ("median", "min", "max", *(f"p{p}" for p in columns), "n"):
        table.add_column(title, justify="right")
    table.add_column("unit")
    for name, metric in result.metrics.items():
        shown = [metric.median, metric.min, metric.max, *(metric.percentiles.get(p) for p in columns)]
        table.add_row(
            name,
            *("" if v is None else f"{v:.4g}" if v < 1000 else f"{v:.0f}" for v in shown),
            str(metric.n),
            metric.unit,
        )
    device = result.device
    where = device.gpu or f"{device.cpu}, {device.cores} cores"
    if device.threads is not None:
        where += f", {device.threads} torch threads"
    console = Console(width=WIDE, soft_wrap=True, highlight=False)
    console.print(Text(f"{result.name}: {result.model}" + (" (a toy model)" if result.toy_model else "")))
    console.print(Text(f"{where}; torch {result.torch}; load average {result.load_average:.1f}"))
    console.print(table)
