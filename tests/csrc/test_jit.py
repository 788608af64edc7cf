"""Building kernel libraries: what is built anew, what is shared, what is refused, and where a library comes from."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import nybble
from nybble.csrc import build_cache, ops, toolchain
from nybble.csrc.jit import CUTLASS_BYTES, Builder, jobs
from nybble.csrc.toolchain import CpuTools, CudaTools, find_nvcc, find_tools, processor
from nybble.csrc.units import CPU, LIBRARIES, PLAIN, KernelLibrary, Unit
from nybble.plugins.errors import KernelBuildError

# Logs what it is asked to make, fails or warns where the source says so, and else writes the command as the result.
FAKE_NVCC = """\
#!/bin/sh
[ "$1" = --version ] && echo "fake nvcc 1" && exit
for word; do
  case "$word" in *.cu|*.cpp) source="$word";; esac
  [ "$last" = -o ] && out="$word"
  last="$word"
done
basename "${source:-link}" >> "$(dirname "$0")/ran"
[ -n "$source" ] && grep -q SLEEP "$source" && sleep 0.5
[ -n "$source" ] && sed -n 's/^SAY //p' "$source"
[ -n "$source" ] && grep -q FAIL "$source" && exit 2
echo "$@" > "$out"
"""
LIBRARY = KernelLibrary(name="toy", binding="bind.cpp", units=(
    Unit(source="a/a.cu", ops=("one", "two")), Unit(source="b.cu", ops=("two",), defines=("PART=1",))))


class Workshop:
    """A source tree, a fake compiler that counts its runs, and a cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.sources = root, root / "csrc"
        (self.sources / "a").mkdir(parents=True)
        for name, text in {"a/a.cu": '#include "a.cuh"\n', "a/a.cuh": '#include "common.h"\n#include "cutlass/gemm.h"',
                           "common.h": "int x;\n", "b.cu": "b\n", "bind.cpp": "bind\n"}.items():
            self.write(name, text)
        nvcc = root / "nvcc"
        nvcc.write_text(FAKE_NVCC)
        nvcc.chmod(0o755)
        self.tools = CudaTools(nvcc=nvcc, torch=root, cutlass=None, versions="1")
        self.cpu_tools = CpuTools(cxx=nvcc, torch=root, versions="1")

    def write(self, name: str, text: str) -> None:
        (self.sources / name).write_text(text)

    def builder(self, **changes: object) -> Builder:
        return Builder(**{"tools": self.tools, "arch": "90a", "cache": self.root / "cache", "sources": self.sources,
                          **changes})

    def build(self, library: KernelLibrary = LIBRARY, **changes: object) -> list[str]:
        """Build a library of these sources; which of them the compiler was run for, and the link."""
        log = self.root / "ran"
        log.unlink(missing_ok=True)
        self.path = self.builder(**changes).build(library).path
        return sorted(log.read_text().split()) if log.exists() else []


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_only_what_changed_is_compiled(shop):
    assert shop.build() == ["a.cu", "b.cu", "bind.cpp", "link"]
    first = shop.path
    assert (shop.build(), shop.path) == ([], first)
    shop.write("common.h", "int y;\n")  # a.cu includes it, through a header
    assert shop.build() == ["a.cu", "link"]
    assert shop.path.parent != first.parent, "a user can tell other sources by the name"
    shop.write("common.h", "int x;\n")
    assert (shop.build(), shop.path) == ([], first)


@pytest.mark.parametrize("changes, compiled", [
    ({"arch": "80"}, ["a.cu", "b.cu", "link"]),
    ({"versions": "2"}, ["a.cu", "b.cu", "bind.cpp", "link"]),
], ids=["another device", "another compiler"])
def test_what_else_is_in_the_key(shop, changes, compiled):
    shop.build()
    if "versions" in changes:
        changes = {"tools": dataclasses.replace(shop.tools, **changes)}
    assert shop.build(**changes) == compiled


def test_what_is_published(shop):
    shop.build()
    assert shop.path.stat().st_mode & 0o777 == 0o755
    assert not list((shop.root / "cache").glob(".build-*")), "nothing half done stays"
    log = next((shop.root / "cache" / "logs").glob("*.log"))
    assert str(shop.tools.nvcc) in log.read_text()


FAILURES = {
    "syntax": ("SAY b.cu(3): error: expected a ;\nSAY noise\nFAIL", ["b.cu PART=1 does not compile (exit code 2)",
                                                                  "b.cu(3): error: expected a ;", "the whole log is"]),
    "memory": ("SAY nvcc error : 'cicc' died due to signal 9 (Kill signal)\nFAIL", ["most likely for memory"]),
    "silence": ("FAIL", ["the compiler said nothing"]),
    **{code: (f"SAY ptxas info : ({code}) Potential Performance Loss", ["ptxas gave up on a Hopper feature", code])
       for code in ("C7508", "C7509", "C7510")},
}


@pytest.mark.parametrize("source, said", FAILURES.values(), ids=FAILURES)
def test_failures_name_the_source_and_the_cause(shop, source, said):
    shop.write("b.cu", source)
    with pytest.raises(KernelBuildError) as error:
        shop.build()
    assert all(text in str(error.value) for text in said), str(error.value)
    assert "noise" not in str(error.value)
    assert not list((shop.root / "cache").glob("*/*.so")), "nothing is published"
    shop.write("b.cu", "b\n")
    assert "link" in shop.build(), "mended, it builds"


def test_two_processes_build_once(shop):
    shop.write("b.cu", "SLEEP\n")
    program = textwrap.dedent("""
        import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
        from test_jit import LIBRARY, Workshop
        shop = Workshop.__new__(Workshop); shop.root = Path(sys.argv[1]); shop.sources = shop.root / "csrc"
        from nybble.csrc.toolchain import CudaTools
        shop.tools = CudaTools(nvcc=shop.root / "nvcc", torch=shop.root, cutlass=None, versions="1")
        print(shop.builder().build(LIBRARY).path)
    """)
    environ = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    both = [subprocess.Popen([sys.executable, "-c", program, str(shop.root), str(Path(__file__).parent)],
                             stdout=subprocess.PIPE, text=True, env=environ) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0] for process in both}
    assert len(paths) == 1 and Path(paths.pop().strip()).is_file()
    assert sorted((shop.root / "ran").read_text().split()) == ["a.cu", "b.cu", "bind.cpp", "link"]


HOST_LIBRARY = dataclasses.replace(LIBRARY, name="host", device="cpu")


def test_a_library_for_the_cpu_is_the_host_compilers(shop):
    """Nothing of CUDA in its commands, and another processor is another library, the binding apart."""
    settings = dict(library=HOST_LIBRARY, tools=shop.cpu_tools)
    assert shop.build(arch="x86_64_1", **settings) == ["a.cu", "b.cu", "bind.cpp", "link"]
    first = shop.path
    assert first.parent.name.startswith("host-x86_64_1-") and shop.build(arch="x86_64_1", **settings) == []
    said = [path.read_text().split("\n")[0] for path in (shop.root / "cache" / "logs").glob("*.log")]
    assert len(said) == 4 and not any(word in line for line in said for word in ("-gencode", "-cudart", "-Xcompiler"))
    assert sorted("-march=native" in line for line in said) == [False, False, True, True]
    assert shop.build(arch="x86_64_2", **settings) == ["a.cu", "b.cu", "link"] and shop.path != first


def test_a_processor_is_named_by_what_it_can_do(tmp_path, monkeypatch):
    def name(text: str) -> str:
        path = tmp_path / f"cpuinfo{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        return processor(path)

    one = name("processor\t: 0\ncpu MHz\t: 12.1\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fma avx2 fpu\n")
    assert one.startswith(platform.machine() + "_") and len(one) == len(platform.machine()) + 9
    assert name("flags\t\t: avx2 fma fpu\ncpu MHz\t: 900\n") == one
    assert name("flags\t\t: avx2 fma fpu avx512f\n") != one and name("Features\t: fp asimd\n") != one
    assert name("cpu\t: POWER9\n") == processor(tmp_path / "nowhere") == ""


def test_a_missing_host_compiler(monkeypatch):
    monkeypatch.setattr(toolchain, "processor", lambda: "")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: "/usr/bin/g++")
    assert "/proc/cpuinfo does not say what this processor can do" in find_tools("cpu")[1]
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    assert find_tools("cpu") == (None, f"there is no g++ on PATH: {toolchain.HOST_FIX}")


@pytest.mark.parametrize("needs, cores, memory, expected", [
    ([1, 1, 1], 2, 100, 2), ([1, 1, 1], 8, 100, 3), ([CUTLASS_BYTES, 1], 8, 7_000_000_000, 1), ([5], 8, 1, 1)])
def test_no_more_compilers_than_memory_and_cores(needs, cores, memory, expected):
    assert jobs(needs, cores=cores, memory=memory) == expected


def test_a_missing_nvcc_says_where_it_was_sought(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.Path, "is_file", lambda path: False)
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    nvcc, reason = find_nvcc()
    assert nvcc is None and "/opt/cuda/bin" in reason and "/usr/local/cuda" in reason and "set NYBBLE_NVCC" in reason
    monkeypatch.setenv("NYBBLE_NVCC", "/nowhere/nvcc")
    assert find_nvcc() == (None, "NYBBLE_NVCC=/nowhere/nvcc is no file")
    assert find_tools() == (None, "NYBBLE_NVCC=/nowhere/nvcc is no file")


def test_an_nvcc_that_does_not_run(monkeypatch, tmp_path):
    (tmp_path / "nvcc").write_text("not a program")
    monkeypatch.setenv("NYBBLE_NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: name)
    tools, reason = find_tools()
    assert tools is None and f"{tmp_path / 'nvcc'} --version fails" in reason


def test_the_order_in_which_nvcc_is_sought(monkeypatch, tmp_path):
    for name in ("home", "path", "pinned"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch(0o755)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(tmp_path / "path" / "bin" / "nvcc"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for variable, value, found in (("CUDA_HOME", "", "path"), ("CUDA_HOME", tmp_path / "home", "home"),
                                   ("NYBBLE_NVCC", tmp_path / "pinned" / "bin" / "nvcc", "pinned")):
        monkeypatch.setenv(variable, str(value))
        assert find_nvcc() == (tmp_path / found / "bin" / "nvcc", "")


def test_a_missing_cutlass_says_how_to_get_it(shop, monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    found, reason = toolchain.find_cutlass()
    assert found is None and "no module cutlass_library" in reason and "pip install" in reason
    needy = dataclasses.replace(LIBRARY, units=(Unit(source="b.cu", ops=("two",), cutlass=True),))
    with pytest.raises(KernelBuildError, match=r"(?s)toy needs CUTLASS's headers.*pip install"):
        shop.builder().build(needy)


def test_cutlass_headers_are_given_to_units_that_ask(shop, tmp_path):
    cutlass = tmp_path / "cutlass"
    (cutlass / "include" / "cutlass").mkdir(parents=True)
    (cutlass / "include" / "cutlass" / "version.h").write_text("4.2")
    units = (Unit(source="a/a.cu", ops=("one",), cutlass=True), Unit(source="b.cu", ops=("two",)))
    builder = shop.builder(tools=dataclasses.replace(shop.tools, cutlass=cutlass))
    builder.build(dataclasses.replace(LIBRARY, units=units))
    commands = {path.read_text() for path in (shop.root / "cache" / "logs").glob("*.log")}
    assert {str(cutlass) in text for text in commands if "a.cu" in text.split("\n")[0] and "-c" in text} == {True}
    assert not any(str(cutlass) in text for text in commands if "b.cu" in text.split("\n")[0])


@pytest.fixture
def sources_of_libraries(monkeypatch, tmp_path, shop):
    """The toy library in the places where `resolve` looks, its tools the fake ones."""
    for name in ("NYBBLE_KERNELS_DIR", "NYBBLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(ops, "PACKAGED", tmp_path / "package")
    monkeypatch.setattr(ops, "find_tools", lambda device: (shop.tools if device == "cuda" else shop.cpu_tools, ""))
    return monkeypatch


def test_where_a_library_comes_from(sources_of_libraries, tmp_path):
    monkeypatch, name = sources_of_libraries, build_cache.file_name(PLAIN, "90a")
    where = lambda: ops.resolve(PLAIN, "90a")  # noqa: E731
    assert where().source == "jit" and set(where().refusals) == {"folder", "package", "cache"}

    monkeypatch.setenv("NYBBLE_JIT", "0")
    assert where().source is None and "jit: NYBBLE_JIT=0 forbids compiling" in where().missing
    with pytest.raises(KernelBuildError, match=r"(?s)nybble_plain for sm_90a cannot be had.*kernels build --out"):
        ops.obtain(PLAIN, "90a")

    monkeypatch.delenv("NYBBLE_JIT")
    built = ops.obtain(PLAIN, "90a")
    assert (where().source, where().path) == ("cache", built)
    monkeypatch.setattr(ops, "find_tools", lambda device: (None, "no nvcc"))
    assert where().path == built, "what was built is found where nothing can be built"

    for source in ("package", "folder"):
        exported = ops.export(PLAIN, "90a", built, tmp_path / source)
        monkeypatch.setenv("NYBBLE_KERNELS_DIR", str(tmp_path / "folder"))
        assert (where().source, where().path, where().missing) == (source, exported, None)
        assert exported.name == name
    exported.rename(exported.with_name("nybble_plain-sm_90a-0123456789abcdef.so"))
    assert "0123456789abcdef.so, of other sources or for another device" in where().refusals["folder"]


def test_a_library_is_sought_once_a_process(monkeypatch):
    """Every layer asks."""
    sought = []
    monkeypatch.setattr(ops, "resolve", lambda library, arch: sought.append(library.name) or ops.Resolution(
        source=None, path=None, refusals={"jit": "no nvcc"}))
    ops._missing.cache_clear()
    reasons = {ops.op_missing(op, torch.device("cuda")) for op in (*PLAIN.ops, *PLAIN.ops)}
    ops._missing.cache_clear()
    assert reasons == {"jit: no nvcc"} and sought == [PLAIN.name]


def test_an_op_that_is_nobodys():
    with pytest.raises(KernelBuildError, match="did you mean paged_attention_v1"):
        ops.load_op("paged_atention_v1", "90a")


def test_every_unit_is_there_and_every_op_in_one_library():
    for library in LIBRARIES:
        for source in (library.binding, *(unit.source for unit in library.units)):
            assert (build_cache.SOURCES / source).is_file(), source
        assert all(f'"{op}(' in (build_cache.SOURCES / library.binding).read_text() for op in library.ops)
    every = [op for library in LIBRARIES for op in library.ops]
    assert len(every) == len(set(every))


LOADED = """
import sys, torch
from nybble.csrc.ops import load_op
from nybble.csrc.units import PLAIN
for op in PLAIN.ops:
    print(load_op(op, "90a")._schema)
try:
    torch.ops.nybble.reshape_and_cache(*[torch.zeros(1)] * 4, 1.0, 1.0)
except NotImplementedError as error:
    print(error)
"""


CPU_LOADED = """
import torch
from nybble.csrc.ops import library_arch, load_op, op_missing, resolve
from nybble.csrc.units import CPU
assert all(op_missing(op, torch.device("cpu")) is None for op in CPU.ops)
for op in CPU.ops:
    print(load_op(op)._schema)
out = torch.empty(1, 3)
torch.ops.nybble.cpu_silu_mul(out, torch.tensor([[0.0, 1.0, 2.0, 3.0, 3.0, 3.0]]))
print(resolve(CPU, library_arch(CPU)).source, out.tolist())
"""


@pytest.mark.timeout(300)
def test_the_cpu_library_builds_without_nvcc_and_runs(tmp_path):
    tools, reason = find_tools("cpu")
    if tools is None:
        pytest.skip(reason)
    environ = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1]), "NYBBLE_CACHE_DIR": str(tmp_path),
               "NYBBLE_NVCC": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", CPU_LOADED], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert all(f"nybble::{op}(" in done.stdout for op in CPU.ops)
    assert "cache [[0.0, 2.19317" in done.stdout


@pytest.mark.timeout(300)
def test_the_plain_library_builds_and_loads_without_a_device(tmp_path):
    tools, reason = find_tools()
    if tools is None:
        pytest.skip(reason)
    environ = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1]), "NYBBLE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    for op in PLAIN.ops:
        assert f"nybble::{op}(" in done.stdout
    assert "Tensor(a!) cache, Tensor slots" in done.stdout, "what an op writes is declared"
    assert "'CPU' backend" in done.stdout


def test_a_toolkit_newer_than_torchs_is_refused(monkeypatch):
    tools = CudaTools(nvcc=Path("nvcc"), torch=Path("torch"), versions="Cuda compilation tools, release 13.0")
    monkeypatch.setattr(ops, "find_tools", lambda device: (tools, ""))
    for cuda, refused in ((None, False), ("13.0", False), ("12.8", True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert ("nvcc is of CUDA 13" in ops._by_jit(PLAIN, "80")[1]) is refused


def test_what_something_else_can_stand_in_for_is_done_without(monkeypatch, caplog):
    """Asked once: every layer of a model would compile again."""
    calls = []

    def failing(op: str) -> None:
        calls.append(op)
        raise PermissionError("read-only cache")

    monkeypatch.setattr(ops, "op_missing", lambda op, device: None)
    monkeypatch.setattr(ops, "load_op", failing)
    ops.optional_op.cache_clear()
    with caplog.at_level("WARNING", logger="nybble"):
        assert [ops.optional_op("w4_few_rows", torch.device("cuda")) for _ in range(3)] == [None] * 3
    assert calls == ["w4_few_rows"] and "doing without the compiled kernel" in caplog.text
    ops.optional_op.cache_clear()
