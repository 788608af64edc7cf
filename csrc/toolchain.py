"""Find what compiles kernels (nvcc, a host compiler, torch's and CUTLASS's headers) without importing any of it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..plugins import env

HOST_COMPILER = "g++"
NVCC_FIX = "install the CUDA toolkit, set NYBBLE_NVCC to its nvcc, or NYBBLE_KERNELS_DIR to a folder of built libraries"
CUTLASS_FIX = "pip install --no-deps 'nvidia-cutlass>=4.2,<4.3'"


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The programs and header folders of a build.

    Attributes:
        nvcc, torch: the compiler, and the folder of the torch package.
        cutlass: the `source` folder of nvidia-cutlass; None where it is not installed.
        versions: what nvcc and the host compiler say of themselves; part of every cache key.
    """

    nvcc: Path
    torch: Path
    cutlass: Path | None
    versions: str

    @property
    def cutlass_includes(self) -> list[str]:
        return [f"-I{self.cutlass}/include", f"-I{self.cutlass}/tools/util/include"] if self.cutlass else []

    @property
    def cutlass_version(self) -> str:
        """A hash of the header that carries CUTLASS's version; empty without CUTLASS."""
        header = self.cutlass and self.cutlass / "include" / "cutlass" / "version.h"
        return hashlib.sha256(header.read_bytes()).hexdigest() if header else ""


def find_tools() -> tuple[Tools | None, str]:
    """(what is needed for a build, why there is none)."""
    nvcc, refusal = find_nvcc()
    torch = _package_folder("torch")
    if nvcc is None or torch is None:
        return None, refusal or "torch is not installed: its headers are needed"
    if shutil.which(HOST_COMPILER) is None:
        return None, f"nvcc needs a host compiler, and there is no {HOST_COMPILER} on PATH (apt install g++)"
    said = {program: _version(program) for program in (str(nvcc), HOST_COMPILER)}
    if silent := [program for program, version in said.items() if not version]:
        return None, f"{silent[0]} --version fails: {NVCC_FIX}"
    return Tools(nvcc=nvcc, torch=torch, cutlass=find_cutlass()[0], versions="\n".join(said.values())), ""


def find_nvcc() -> tuple[Path | None, str]:
    """(nvcc, why there is none): NYBBLE_NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, then nvidia's packages."""
    pinned = env.read_str("NYBBLE_NVCC")
    if pinned:
        path = Path(pinned)
        return (path, "") if path.is_file() else (None, f"NYBBLE_NVCC={pinned} is no file")
    on_path = shutil.which("nvcc")
    packages = find_spec("nvidia")
    folders = [
        *(Path(home) / "bin" for home in env.cuda_homes()),
        *([Path(on_path).parent] if on_path else []),
        Path("/usr/local/cuda/bin"),
        *(Path(root) / "cu13" / "bin" for root in (packages and packages.submodule_search_locations) or ()),
    ]
    found = next((folder / "nvcc" for folder in folders if (folder / "nvcc").is_file()), None)
    searched = ", ".join(["NYBBLE_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", *map(str, folders)])
    return found, "" if found else f"no nvcc in {searched}: {NVCC_FIX}"


def find_cutlass() -> tuple[Path | None, str]:
    """(the folder that holds CUTLASS's `include`, why there is none)."""
    package = _package_folder("cutlass_library")
    if package is None:
        return None, f"CUTLASS's headers are not installed (no module cutlass_library): {CUTLASS_FIX}"
    source = package / "source"
    if not (source / "include" / "cutlass" / "version.h").is_file():
        return None, f"{source} holds no CUTLASS headers: {CUTLASS_FIX}"
    return source, ""


def _package_folder(module: str) -> Path | None:
    spec = find_spec(module)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@cache
def _version(program: str) -> str:
    """What a program says of itself, asked once a process; empty when it does not run."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
