"""`nybble kernels`: what it says of libraries that are there, that could be built, and that cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nybble as package
from nybble.csrc import build_cache, ops
from nybble.csrc.toolchain import CpuTools, CudaTools, processor
from nybble.csrc.units import CPU, CUTLASS, PLAIN
from nybble.engine.cli import kernels, main

FAKE_NVCC = """\
#!/bin/sh
for word; do [ "$last" = -o ] && echo built > "$word"; last="$word"; done
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """No device, an empty cache, and a compiler that does nothing but write its output."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    tools = {"cuda": CudaTools(nvcc=nvcc, torch=tmp_path, cutlass=None, versions="1"),
             "cpu": CpuTools(cxx=nvcc, torch=tmp_path, versions="1")}
    for module in (ops, kernels):
        monkeypatch.setattr(module, "find_tools", lambda device: (tools[device], ""))
    monkeypatch.setattr(ops, "find_cutlass", lambda: (None, "no CUTLASS here"))
    monkeypatch.setattr(kernels, "cuda_devices", lambda: (0, "none"))
    monkeypatch.setattr(ops, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NYBBLE_KERNELS_DIR", raising=False)
    return monkeypatch


@pytest.fixture
def nybble(capsys):
    def call(*argv: str) -> tuple[int, str, str]:
        code = main(["kernels", *argv])
        return code, *capsys.readouterr()

    return call


def test_list(machine, nybble):
    code, out, _ = nybble("list")
    assert code == 0
    assert "nybble_plain (sm_90a): not built yet" in out and "nybble_cutlass (sm_90a): not available" in out
    assert "jit      no: no CUTLASS here" in out
    assert f"nybble_cpu ({processor()}): not built yet" in out
    for unit in (*PLAIN.units, *CPU.units, *CUTLASS.units):
        assert f"{unit.label} " in out and ", ".join(unit.ops) in out


def test_build_then_why(machine, nybble, tmp_path):
    code, out, _ = nybble("build", "nybble_plain", "--arch", "80", "--out", str(tmp_path / "out"))
    built = tmp_path / "out" / build_cache.file_name(PLAIN, "80")
    assert code == 0 and built.is_file() and str(built) in out
    assert all(f"  {unit.label} " in out for unit in PLAIN.units)
    machine.setenv("NYBBLE_KERNELS_DIR", str(tmp_path / "out"))
    code, out, _ = nybble("why", "paged_attention_v1", "--arch", "80")
    assert (code, out.splitlines()[1]) == (0, f"  folder   yes: {built}")
    code, out, _ = nybble("why", "paged_attention_v1")  # for another device
    assert code == 0 and f"no: {tmp_path / 'out'} has {built.name}, of other sources or for another" in out
    machine.setenv("NYBBLE_JIT", "0")
    code, out, _ = nybble("why", "paged_attention_v1")
    assert code == 1 and out.splitlines()[-1] == "  jit      no: NYBBLE_JIT=0 forbids compiling"


def test_a_library_for_the_cpu_is_for_this_processor(machine, nybble, tmp_path):
    code, out, _ = nybble("build", "nybble_cpu", "--arch", "80", "--out", str(tmp_path / "out"))
    built = tmp_path / "out" / build_cache.file_name(CPU, processor())
    assert code == 0 and built.is_file() and str(built) in out
    machine.setenv("NYBBLE_KERNELS_DIR", str(tmp_path / "out"))
    code, out, _ = nybble("why", "cpu_attention")
    assert code == 0
    assert out.splitlines() == [f"cpu_attention of nybble_cpu for {processor()}", f"  folder   yes: {built}"]


@pytest.mark.parametrize("argv, code, said", [
    (("why", "paged_atention_v1"), 2, "did you mean paged_attention_v1?"),
    (("build", "nybble_plane"), 2, "did you mean nybble_plain?"),
    (("build", "nybble_cutlass"), 7, "nybble_cutlass needs CUTLASS's headers"),
])
def test_mistakes(machine, nybble, argv, code, said):
    found, _, err = nybble(*argv)
    assert found == code and said in err


def test_no_compiler(machine, nybble):
    machine.setattr(kernels, "find_tools", lambda device: (None, "no nvcc in /usr/local/cuda/bin"))
    code, _, err = nybble("build")
    assert code == 7 and "no nvcc in /usr/local/cuda/bin" in err


def test_help_and_list_import_nothing_heavy(tmp_path):
    program = ("import sys\nfrom nybble.engine.cli import main\n"
               "assert main(['kernels', '--help']) == main(['kernels', 'list']) == 0\n"
               "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)")
    environ = {"PYTHONPATH": str(Path(package.__file__).parents[1]), "NYBBLE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
