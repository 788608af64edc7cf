"""The table of compiled kernels: which source holds which op, and which library holds which sources."""

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
    """What is linked, cached and loaded as one file: units, and the host-only source that binds their ops to torch."""

    name: str
    binding: str
    units: tuple[Unit, ...]

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op for unit in self.units for op in unit.ops))


PLAIN = KernelLibrary(
    name="nybble_plain",
    binding="bind.cpp",
    units=(
        Unit(source="attention/paged_attention.cu", ops=("paged_attention_v1", "paged_attention_v2")),
        Unit(source="w4a16_gemm/few_rows.cu", ops=("w4_few_rows", "w4_experts")),
        Unit(source="fp8_gemm/few_rows.cu", ops=("fp8_few_rows",)),
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

LIBRARIES = (PLAIN, CUTLASS)


def library_of(op: str) -> KernelLibrary | None:
    """The library that holds an op of `torch.ops.nybble`; None when none does."""
    return next((library for library in LIBRARIES if op in library.ops), None)
