"""Find what compiles kernels (nvcc, the host's compiler, torch's and CUTLASS's headers), importing none of it; and its
flags."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from ..plugins import env
from .units import Unit

HOST_COMPILER = "g++"
HOST_FIX = "apt install g++, or set NYBBLE_KERNELS_DIR to a folder of libraries built on such a machine"
NVCC_FIX = "install the CUDA toolkit, set NYBBLE_NVCC to its nvcc, or NYBBLE_KERNELS_DIR to a folder of built libraries"
CUTLASS_FIX = "pip install --no-deps 'nvidia-cutlass>=4.2,<4.3'"

# torch 2.11, the oldest whose stable ABI has what the bindings use: without it a library loads on no torch but its own.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Products and sums contract to one instruction, as everywhere on CUDA; -std=c++17 alone forbids it.
# -O3's rates in half its time: somebody waits for it at the first start.
CPU_FLAGS = ("-std=c++17", "-O2", "-fvect-cost-model=dynamic", "-fpeel-loops", "-funswitch-loops", "-fsplit-loops",
             "-ffp-contract=fast", "-DNDEBUG", "-fPIC", "-fvisibility=hidden")
CPUINFO = Path("/proc/cpuinfo")
MODEL_KEYS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU variant", "CPU part")


@dataclass(frozen=True, kw_only=True)
class Tools(ABC):
    """The compiler and header folders of a build, and the flags that one kind of device needs.

    Attributes:
        torch: the folder of the torch package.
        cutlass: the `source` folder of nvidia-cutlass; None where it is not installed, or of no use.
        versions: what the compilers say of themselves; part of every cache key.
        binding_flags, link_flags: of the source that binds ops to torch, and of the link.
    """

    torch: Path
    cutlass: Path | None = None
    versions: str
    binding_flags: ClassVar[tuple[str, ...]]
    link_flags: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def compiler(self) -> Path:
        """What compiles and links."""

    @abstractmethod
    def unit_flags(self, unit: Unit, arch: str) -> tuple[str, ...]:
        """Flags of a unit for an architecture; part of its cache key."""

    @abstractmethod
    def unit_stamp(self, unit: Unit, arch: str) -> str:
        """What else the compiled unit depends on; part of its cache key."""

    @property
    def cutlass_includes(self) -> list[str]:
        return [f"-I{self.cutlass}/include", f"-I{self.cutlass}/tools/util/include"] if self.cutlass else []

    @property
    def cutlass_version(self) -> str:
        """A hash of the header that carries CUTLASS's version; empty without CUTLASS."""
        header = self.cutlass and self.cutlass / "include" / "cutlass" / "version.h"
        return hashlib.sha256(header.read_bytes()).hexdigest() if header else ""


@dataclass(frozen=True, kw_only=True)
class CudaTools(Tools):
    """nvcc, which brings the CUDA runtime; an architecture is a compute capability as it writes it ("90a")."""

    nvcc: Path
    binding_flags: ClassVar[tuple[str, ...]] = (*CUDA_FLAGS, TORCH_TARGET)
    # libtorch.so pulls in the CUDA parts, where bind.h's weak symbols are; the linker would drop it as unused.
    link_flags: ClassVar[tuple[str, ...]] = (
        "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed", "-Xlinker", "--exclude-libs,ALL", "-Xlinker",
        "-s", "-ltorch")

    @property
    def compiler(self) -> Path:
        return self.nvcc

    def unit_flags(self, unit: Unit, arch: str) -> tuple[str, ...]:
        return (*CUDA_FLAGS, "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xptxas", "-v",
                f"-gencode=arch=compute_{arch},code=sm_{arch}", *(f"-D{define}" for define in unit.defines))

    def unit_stamp(self, unit: Unit, arch: str) -> str:
        return self.cutlass_version if unit.cutlass else ""


@dataclass(frozen=True, kw_only=True)
class CpuTools(Tools):
    """The host's C++ compiler alone; an architecture is `processor`'s, and what is compiled runs on that one."""

    cxx: Path
    binding_flags: ClassVar[tuple[str, ...]] = (*CPU_FLAGS, TORCH_TARGET)
    link_flags: ClassVar[tuple[str, ...]] = ("-shared", "-Wl,--exclude-libs,ALL", "-Wl,-s", "-ltorch_cpu")

    @property
    def compiler(self) -> Path:
        return self.cxx

    def unit_flags(self, unit: Unit, arch: str) -> tuple[str, ...]:
        return (*CPU_FLAGS, "-march=native", *(f"-D{define}" for define in unit.defines))

    def unit_stamp(self, unit: Unit, arch: str) -> str:
        return arch  # "native" means another processor elsewhere


def find_tools(device: str = "cuda") -> tuple[Tools | None, str]:
    """(what is needed to build a library for a kind of device, why there is none)."""
    torch = _package_folder("torch")
    if torch is None:
        return None, "torch is not installed: its headers are needed"
    return _find_cuda_tools(torch) if device == "cuda" else _find_cpu_tools(torch)


def _find_cpu_tools(torch: Path) -> tuple[CpuTools | None, str]:
    found = shutil.which(HOST_COMPILER)
    if found is None:
        return None, f"there is no {HOST_COMPILER} on PATH: {HOST_FIX}"
    if not processor():
        return None, f"{CPUINFO} does not say what this processor can do, and one that differs could not run the result"
    versions = _version(found)
    if not versions:
        return None, f"{found} --version fails: {HOST_FIX}"
    return CpuTools(cxx=Path(found), torch=torch, versions=versions), ""


@cache
def processor(cpuinfo: Path | None = None) -> str:
    """A name of what this machine's processors can do: equal names run each other's code. Empty where it is not told.

    Linux's own list of features and not what a compiler makes of it: the name is needed where there is no compiler.
    """
    cpuinfo = cpuinfo or CPUINFO
    if not cpuinfo.is_file():
        return ""
    said = [line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines()]
    features = {" ".join(sorted(value.split())) for key, _, value in said if key.strip() in ("flags", "Features")}
    if not features:
        return ""
    # A compiler asks the processor itself, and may learn of features that an old Linux does not list.
    features |= {f"{key.strip()} {value.strip()}" for key, _, value in said if key.strip() in MODEL_KEYS}
    return f"{platform.machine()}_{hashlib.sha256(repr(sorted(features)).encode()).hexdigest()[:8]}"


def _find_cuda_tools(torch: Path) -> tuple[CudaTools | None, str]:
    nvcc, refusal = find_nvcc()
    if nvcc is None:
        return None, refusal
    if shutil.which(HOST_COMPILER) is None:
        return None, f"nvcc needs a host compiler, and there is no {HOST_COMPILER} on PATH (apt install g++)"
    said = {program: _version(program) for program in (str(nvcc), HOST_COMPILER)}
    if silent := [program for program, version in said.items() if not version]:
        return None, f"{silent[0]} --version fails: {NVCC_FIX}"
    return CudaTools(nvcc=nvcc, torch=torch, cutlass=find_cutlass()[0], versions="\n".join(said.values())), ""


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
