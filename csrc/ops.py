"""Compiled ops: where a library would come from, why not from elsewhere, and the op itself, loaded once a process."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins import env
from ..plugins.errors import KernelBuildError, did_you_mean
from ..plugins.log import get_logger
from .build_cache import SOURCES, cache_folder, file_name
from .jit import Builder
from .toolchain import Tools, find_cutlass, find_tools, processor
from .units import LIBRARIES, KernelLibrary, library_of

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

DEFAULT_ARCH = "90a"
PACKAGED = SOURCES / "prebuilt"
Look = Callable[[KernelLibrary, str], tuple[Path | None, str]]


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Where one library comes from.

    Attributes:
        source: "folder" (NYBBLE_KERNELS_DIR), "package", "cache" or "jit"; None when no source has it.
        path: its file; None when it is still to be built.
        refusals: every source that was passed over, and why.
    """

    source: str | None
    path: Path | None
    refusals: Mapping[str, str]

    @property
    def missing(self) -> str | None:
        """None when the library can be had, else every reason why not."""
        if self.source is not None:
            return None
        return "; ".join(f"{source}: {reason}" for source, reason in self.refusals.items())


def resolve(library: KernelLibrary, arch: str) -> Resolution:
    """The first source that has a library for a device, without building anything."""
    looks: dict[str, Look] = {"folder": _in_folder, "package": _in_package, "cache": _in_cache, "jit": _by_jit}
    refusals: dict[str, str] = {}
    for source, look in looks.items():
        try:
            path, reason = look(library, arch)
        except OSError as error:  # a folder that may not be searched
            path, reason = None, str(error)
        if not reason:
            return Resolution(source=source, path=path, refusals=refusals)
        refusals[source] = reason
    return Resolution(source=None, path=None, refusals=refusals)


def _in_folder(library: KernelLibrary, arch: str) -> tuple[Path | None, str]:
    folder = env.read_str("NYBBLE_KERNELS_DIR")
    return _prebuilt(Path(folder), library, arch) if folder else (None, "NYBBLE_KERNELS_DIR is not set")


def _in_package(library: KernelLibrary, arch: str) -> tuple[Path | None, str]:
    return _prebuilt(PACKAGED, library, arch)


def _prebuilt(folder: Path, library: KernelLibrary, arch: str) -> tuple[Path | None, str]:
    wanted = folder / file_name(library, arch)
    if wanted.is_file():
        return wanted, ""
    others = ", ".join(sorted(path.name for path in folder.glob(f"{library.name}-*.so")))
    if others:
        return None, f"{folder} has {others}, of other sources or for another device: not {wanted.name}"
    return None, f"{folder} has no {wanted.name}"


def _in_cache(library: KernelLibrary, arch: str) -> tuple[Path | None, str]:
    root = cache_folder()
    tools, _ = find_tools(library.device)
    if tools is not None:
        path = Builder(tools=tools, arch=arch, cache=root).cached(library)
        return (path, "") if path.is_file() else (None, f"{path.parent} does not hold {path.name}")
    # nothing here could build a better one: any of these sources will do
    folder = root / Path(file_name(library, arch)).stem
    built = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)
    return (built[-1], "") if built else (None, f"there is no {folder}")


def _by_jit(library: KernelLibrary, arch: str) -> tuple[Path | None, str]:
    if not env.read_flag("NYBBLE_JIT", default=True):
        return None, "NYBBLE_JIT=0 forbids compiling"
    tools, reason = find_tools(library.device)
    if tools is not None:
        reason = _too_new(tools) or (find_cutlass()[1] if any(unit.cutlass for unit in library.units) else "")
    return None, reason


def _too_new(tools: Tools) -> str:
    """Why what nvcc makes may not run: the runtime is linked in, and a driver of torch's CUDA may be too old for it."""
    torch, found = sys.modules.get("torch"), re.search(r"release (\d+)", tools.versions)
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    if cuda is None or found is None or int(found[1]) <= int(cuda.partition(".")[0]):
        return ""
    return f"nvcc is of CUDA {found[1]} and torch of {cuda}: set NYBBLE_NVCC to one of torch's"


def obtain(library: KernelLibrary, arch: str) -> Path:
    """The library's file, built if need be. Raises KernelBuildError with every source's reason."""
    resolution = resolve(library, arch)
    if resolution.path is not None:
        return resolution.path
    tools, _ = find_tools(library.device)
    if resolution.source is None or tools is None:
        raise KernelBuildError(f"{library.name} for {library.target(arch)} cannot be had", found=resolution.missing,
                               fix="nybble kernels build --out DIR where a compiler is, then NYBBLE_KERNELS_DIR=DIR "
                                   "here")
    built = Builder(tools=tools, arch=arch, cache=cache_folder()).build(library)
    log.info("built %s in %.1f s", library.name, built.seconds)
    return built.path


def export(library: KernelLibrary, arch: str, built: Path, folder: Path) -> Path:
    """Copy a built library to where NYBBLE_KERNELS_DIR may point."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(built, folder / file_name(library, arch)))


def device_arch(device: torch.device | None = None) -> str:
    """What nvcc calls a CUDA device; Hopper's where there is none. Architecture-specific features are asked for."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def library_arch(library: KernelLibrary, device: torch.device | None = None) -> str:
    """What a library is compiled for here: a CUDA device's capability, or this processor."""
    return device_arch(device) if library.device == "cuda" else processor()


def op_missing(op: str, device: torch.device) -> str | None:
    """Why a compiled op cannot be had for a device, every source's reason; None when it can. Builds nothing."""
    library = _library(op)
    if device.type != library.device:
        return f"runs on {library.device.upper()}, not on {device.type}"
    return _missing(library, library_arch(library, device))


@cache
def _missing(library: KernelLibrary, arch: str) -> str | None:
    """Asked for by every layer, and hashing the sources takes milliseconds: the answer is a process's."""
    return resolve(library, arch).missing


@cache
def optional_op(op: str, device: torch.device) -> Any | None:
    """`load_op` of an op that something else can stand in for: None where it cannot be had, and a warning says why if
    that is a surprise."""
    if op_missing(op, device) is not None:
        return None
    try:
        return load_op(op)
    except (KernelBuildError, OSError, RuntimeError) as error:
        log.warning("doing without the compiled kernel %s: %s", op, error)
        return None


@cache
def load_op(op: str, arch: str | None = None) -> Any:
    """`torch.ops.nybble.<op>`'s overload, whose call is cheapest; finds, builds and loads its library the first time.

    Raises KernelBuildError when the library cannot be had or loaded.
    """
    import torch

    library = _library(op)
    _load(library, arch or library_arch(library))
    return getattr(torch.ops.nybble, op).default


def _load(library: KernelLibrary, arch: str) -> None:
    if (failure := _tried(library, arch)) is not None:
        raise failure


@cache
def _tried(library: KernelLibrary, arch: str) -> KernelBuildError | None:
    """Load a library, once a process: why it failed is remembered, too, and not tried again by each of its ops."""
    import torch

    try:
        path = obtain(library, arch)
    except OSError as error:
        return KernelBuildError(f"{library.name} for {library.target(arch)} cannot be built", found=error)
    except KernelBuildError as error:
        return error
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return KernelBuildError(f"{path} does not load", found=error,
                                fix="remove it, and it is built anew; it needs torch >= 2.11")
    return None


def _library(op: str) -> KernelLibrary:
    library = library_of(op)
    if library is None:
        known = [op for library in LIBRARIES for op in library.ops]
        raise KernelBuildError(f"there is no compiled op {op!r}", known=known, fix=did_you_mean(op, known))
    return library
