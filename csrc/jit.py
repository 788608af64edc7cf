"""Build a kernel library: compile what the cache lacks in parallel, link, publish; and say readably what failed."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from ..plugins.errors import KernelBuildError
from ..plugins.log import get_logger
from . import build_cache
from .build_cache import FORMAT, SOURCES, digest, publish
from .toolchain import CUTLASS_FIX, Tools
from .units import KernelLibrary, Unit

log = get_logger(__name__)

# Memory of one compiler at its worst.
CUTLASS_BYTES, PLAIN_BYTES = 5_500_000_000, 1_000_000_000
# ptxas gave up on a Hopper feature: the kernel runs, at a fraction of its speed.
SLOW_CODE = re.compile(r"^.*\bC75(?:08|09|10)\b.*$", re.MULTILINE)
SPILL = re.compile(r"(\d+) bytes spill stores")
ERROR_LINE = re.compile(r"^.*\b(?:error|undefined reference)\b.*$", re.MULTILINE | re.IGNORECASE)
SHOWN_LINES = 8


@dataclass(frozen=True, kw_only=True)
class BuiltObject:
    """One compiled unit: seconds it took now, its size, and the most bytes one of its kernels spills (0 if cached)."""

    label: str
    seconds: float
    size: int
    cached: bool
    spills: int = 0


@dataclass(frozen=True, kw_only=True)
class BuiltLibrary:
    """A library in the cache; `objects` is empty when the whole of it was there."""

    path: Path
    seconds: float
    objects: tuple[BuiltObject, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One run of a compiler: its key in the cache, the command without its output, and the memory it may take."""

    label: str
    key: str
    command: tuple[str, ...]
    memory: int


@dataclass(frozen=True, kw_only=True)
class Builder:
    """What a build needs to know; `sources` and `cache` are this package's and this user's outside tests.

    Args:
        arch: what the tools compile for: a compute capability, or a `toolchain.processor`.
    """

    tools: Tools
    arch: str
    cache: Path
    sources: Path = SOURCES

    def cached(self, library: KernelLibrary) -> Path:
        """Where the library is, or will be: named by sources and device, then by tools and flags."""
        name = Path(build_cache.file_name(library, self.arch, self.sources))
        key = digest([*(step.key for step in self._steps(library)), *self.tools.link_flags])
        return self.cache / name.stem / f"{key[:16]}.so"

    def build(self, library: KernelLibrary) -> BuiltLibrary:
        """The library's file, built if the cache lacks it; processes that want the same wait for one.

        Raises KernelBuildError with the failing source, the compiler's first errors and the log's path.
        """
        start, path = time.perf_counter(), self.cached(library)
        if not path.is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            with FileLock(self.cache / f"{path.parent.name}.lock"):
                if not path.is_file():
                    objects = self._build(library, path)
                    return BuiltLibrary(path=path, seconds=time.perf_counter() - start, objects=objects)
        return BuiltLibrary(path=path, seconds=time.perf_counter() - start, objects=())

    def _build(self, library: KernelLibrary, path: Path) -> tuple[BuiltObject, ...]:
        if any(unit.cutlass for unit in library.units) and self.tools.cutlass is None:
            raise KernelBuildError(f"{library.name} needs CUTLASS's headers", found="no module cutlass_library",
                                   fix=CUTLASS_FIX)
        steps = self._steps(library)
        log.info("building %s for %s: %d files", library.name, library.target(self.arch), len(steps))
        with tempfile.TemporaryDirectory(prefix=".build-", dir=self.cache) as name:
            scratch = Path(name)
            pool = ThreadPoolExecutor(jobs([step.memory for step in steps], cores=len(os.sched_getaffinity(0)),
                                           memory=psutil.virtual_memory().available))
            try:
                objects = tuple(pool.map(lambda step: self._compile(step, scratch), steps))
            finally:
                pool.shutdown(cancel_futures=True)
            linked = scratch / path.name
            command = (str(self.tools.compiler), *(str(self._object(step)) for step in steps), "-o", str(linked),
                       f"-L{self.tools.torch}/lib", *self.tools.link_flags)
            self._run(f"link of {library.name}", path.stem, command, scratch)
            publish(linked, path)
        return objects

    def _steps(self, library: KernelLibrary) -> list[Step]:
        torch = self.tools.torch / "include"
        flags = self.tools.binding_flags
        binding = (str(self.tools.compiler), *flags, f"-I{torch}", f"-I{self.sources}", "-c",
                   str(self.sources / library.binding))
        content = build_cache.content(library.binding, self.sources)
        key = digest([FORMAT, self.tools.versions, *flags, content])
        return [*map(self._unit_step, library.units),
                Step(label=library.binding, key=key, command=binding, memory=PLAIN_BYTES)]

    def _unit_step(self, unit: Unit) -> Step:
        flags = self.tools.unit_flags(unit, self.arch)
        includes = self.tools.cutlass_includes if unit.cutlass else []
        key = digest([FORMAT, self.tools.versions, self.tools.unit_stamp(unit, self.arch), *flags,
                      build_cache.unit_content(unit, self.sources)])
        command = (str(self.tools.compiler), *flags, f"-I{self.sources}", *includes, "-c",
                   str(self.sources / unit.source))
        return Step(label=unit.label, key=key, command=command,
                    memory=CUTLASS_BYTES if unit.cutlass else PLAIN_BYTES)

    def _object(self, step: Step) -> Path:
        return self.cache / "objects" / f"{step.key[:32]}.o"

    def _compile(self, step: Step, scratch: Path) -> BuiltObject:
        place = self._object(step)
        if place.is_file():
            return BuiltObject(label=step.label, seconds=0.0, size=place.stat().st_size, cached=True)
        start, made = time.perf_counter(), scratch / place.name
        said = self._run(step.label, place.stem, (*step.command, "-o", str(made)), scratch)
        if slow := SLOW_CODE.findall(said):
            raise KernelBuildError(f"{step.label}: ptxas gave up on a Hopper feature, and the kernel would be slow",
                                   found="\n         ".join(slow[:SHOWN_LINES]),
                                   fix="give the kernel __launch_bounds__ with a minimum of blocks, and let nothing "
                                       "touch wgmma's registers while it runs")
        publish(made, place)
        return BuiltObject(label=step.label, seconds=time.perf_counter() - start, size=place.stat().st_size,
                           cached=False, spills=max(map(int, SPILL.findall(said)), default=0))

    def _run(self, label: str, stem: str, command: Sequence[str], scratch: Path) -> str:
        """Run a compiler and return what it said, which is kept as a log. Raises KernelBuildError."""
        done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", check=False)
        record = self.cache / "logs" / f"{stem}.log"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{' '.join(command)}\n\n{done.stdout}")
        if done.returncode == 0:
            return done.stdout
        lines = ERROR_LINE.findall(done.stdout) or done.stdout.splitlines()[-SHOWN_LINES:]
        killed = done.returncode in (-9, 137) or "signal 9" in done.stdout
        raise KernelBuildError(f"{label} does not compile (exit code {done.returncode})",
                               found="\n         ".join(lines[:SHOWN_LINES]) or "the compiler said nothing",
                               fix=(f"it was killed, most likely for memory (a CUTLASS unit takes "
                                    f"{CUTLASS_BYTES / 1e9:.1f} GB): free some; " if killed else "")
                               + f"the whole log is {record}")


def jobs(needs: Sequence[int], *, cores: int, memory: int) -> int:
    """How many compilers to run at once, when each may take the largest of `needs` of the `memory` bytes."""
    return max(1, min(len(needs), cores, memory // max(needs)))
