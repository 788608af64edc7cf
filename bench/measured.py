"""One timed kernel beside its floor: the row that every family prints, keeps as metrics and draws."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .floors import Floors, time_calls
from .results import Metric

COLUMNS = f"{'case':<31} {'kernel':<14} {'size':>6} {'us':>10} {'floor us':>9} {'share':>6} {'GB/s':>7} {'Tops':>7} " \
          f"{'error':>8}"
# What asks the host how to go on, so that no CUDA graph can hold it: timed as it is called, launches included.
EAGER = ("torch", "reference")
KEEP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One implementation of one case at one size.

    Attributes:
        family, case: "linear", "gate_up/fp8-channel". size: tokens, or what else the case grows by.
        seconds: of each sample, a call. moved, operations: bytes and operations that no implementation can do without.
        kind: of the operations, as `Floors` names it. error: the worst, as a share of what is allowed; None where the
            implementation is the yardstick itself.
        note: what else should be known, such as the experts that were hit.
    """

    family: str
    case: str
    kernel: str
    size: int
    seconds: Sequence[float]
    moved: float
    operations: float
    kind: str
    error: float | None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def line(self, floors: Floors) -> str:
        least = floors.seconds(self.moved, self.operations, self.kind)
        error = "-" if self.error is None else f"{self.error:.2f}"
        return (f"{self.case:<31} {self.kernel:<14} {self.size:>6} {self.median * 1e6:>10.1f} {least * 1e6:>9.1f} "
                f"{least / self.median:>6.1%} {self.moved / self.median / 1e9:>7.0f} "
                f"{self.operations / self.median / 1e12:>7.1f} {error:>8} {self.note}").rstrip()

    def metrics(self, floors: Floors) -> dict[str, Metric]:
        """Microseconds, and the share of the floor."""
        least, name = floors.seconds(self.moved, self.operations, self.kind), f"{self.case}/{self.kernel}/{self.size}"
        return {name: Metric.of([1e6 * s for s in self.seconds], "us", better="lower"),
                f"{name}/share": Metric.of([least / s for s in self.seconds], "of floor", better="higher")}


@dataclass(kw_only=True)
class Collector:
    """What a run has measured and what it could not, each told when it is known.

    Args:
        budget: seconds after which no new case is begun; 0 is no limit.
        keep: called now and then, between two cases, so that a run that is killed leaves what it has measured.
    """

    floors: Floors
    device: torch.device
    samples: int
    budget: float = 0.0
    rows: list[Measured] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    keep: Callable[[Collector], None] | None = None
    begun: float = field(default_factory=time.monotonic)
    kept: float = field(default_factory=time.monotonic)

    def done(self) -> bool:
        """Whether the budget is spent: asked before every case, says so once, and keeps what there is meanwhile."""
        if self.keep is not None and time.monotonic() - self.kept > KEEP_SECONDS:
            self.keep(self)
            self.kept = time.monotonic()
        if not self.budget or time.monotonic() - self.begun < self.budget:
            return False
        self.skip(f"budget/{self.budget:g}", "these seconds are spent: what follows of this family is left out")
        return True

    def add(self, row: Measured) -> None:
        self.rows.append(row)
        print(row.line(self.floors), flush=True)

    def skip(self, what: str, reason: str) -> None:
        """Something that is not timed, "case/kernel", and why; told once."""
        if self.absent.get(what) != reason:
            self.absent[what] = reason
            print(f"{what:<46} n/a: {reason}", flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """Something that said it could run, and then could not."""
        self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def refuse(self, what: str, error: float, bound: str) -> None:
        """A result that is not right: its kernel is not timed."""
        self.wrong.append(f"{what}: {error:.3g} {bound}")
        print(f"{what:<46} WRONG: {error:.3g} {bound}", flush=True)

    def time(self, kernel: str, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds a call over rotating inputs: as a CUDA graph, or as they are where a kernel asks the host."""
        return time_calls(calls, self.device, samples=self.samples, graph=kernel not in EAGER)

    def metrics(self) -> dict[str, Metric]:
        return {name: metric for row in self.rows for name, metric in row.metrics(self.floors).items()}
