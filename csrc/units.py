"""The table of compiled kernels: which source holds which op, which library which sources, and for what device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One translation unit of torch-free launchers.

    Attributes:
        source: a path below `csrc/`.
        ops: names under `torch.ops.nybble` that its launchers serve.
        cutlass: whether it includes CUTLASS headers (then it also costs gigabytes to compile).
        defines: macros, for a source that is compiled several times with parts of its instances each.
    """

    source: str
    ops: tuple[str, ...]
    cutlass: bool = False
    defines: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((self.source, *self.defines))


@dataclass(frozen=True, kw_only=True)
class KernelLibrary:
    """What is linked, cached and loaded as one file: units, and the host-only source that binds their ops to torch.

    Attributes:
        device: "cuda" is compiled by nvcc for a compute capability, "cpu" by the host's compiler for its processor.
    """

    name: str
    binding: str
    units: tuple[Unit, ...]
    device: str = "cuda"

    def target(self, arch: str) -> str:
        """An architecture as people and file names have it."""
        return f"sm_{arch}" if self.device == "cuda" else arch

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op for unit in self.units for op in unit.ops))


PLAIN = KernelLibrary(
    name="nybble_plain",
    binding="bind.cpp",
    units=(
        Unit(source="attention/paged_attention.cu", ops=("paged_attention_v1", "paged_attention_v2")),
        Unit(source="attention/prompt_attention.cu", ops=("prompt_attention",)),
        Unit(source="w4a16_gemm/few_rows.cu", ops=("w4_few_rows", "w4_experts")),
        Unit(source="w4a16_gemm/mid_rows.cu", ops=("w4_mid_rows",)),
        Unit(source="fp8_gemm/few_rows.cu", ops=("fp8_few_rows", "fp8_few_rows_rounding")),
        Unit(source="norm_rope/silu_mul_fp8.cu", ops=("silu_mul_fp8",)),
        Unit(source="attention/reshape_and_cache.cu", ops=("reshape_and_cache",)),
    ),
)

# Instances of one source in several units: one compiler would take all of a small machine's memory.
CUTLASS = KernelLibrary(
    name="nybble_cutlass",
    binding="bind_cutlass.cpp",
    units=(
        Unit(source="fp8_gemm/launch.cu", ops=("fp8_gemm",)),
        *(Unit(source="fp8_gemm/tiles.cu", ops=("fp8_gemm",), cutlass=True, defines=(f"HALF={half}", f"MANY={many}"))
          for half in (0, 1) for many in (0, 1)),
        Unit(source="moe_gemm/grouped_launch.cu", ops=("grouped_fp8_gemm", "grouped_fp8_workspace")),
        *(Unit(source="moe_gemm/grouped_tiles.cu", ops=("grouped_fp8_gemm", "grouped_fp8_workspace"), cutlass=True,
               defines=(f"MANY={many}",)) for many in (0, 1)),
    ),
)

CPU = KernelLibrary(
    name="nybble_cpu",
    binding="bind_cpu.cpp",
    device="cpu",
    units=(
        Unit(source="attention/cpu_attention.cpp", ops=("cpu_attention",)),
        Unit(source="attention/cpu_cache.cpp", ops=("cpu_store_kv", "cpu_rope_and_cache")),
        Unit(source="norm_rope/cpu_norm.cpp", ops=("cpu_rms_norm", "cpu_silu_mul")),
    ),
)

LIBRARIES = (PLAIN, CPU, CUTLASS)


def library_of(op: str) -> KernelLibrary | None:
    """The library that holds an op of `torch.ops.nybble`; None when none does."""
    return next((library for library in LIBRARIES if op in library.ops), None)
