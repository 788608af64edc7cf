"""`nybble kernels list | build | why`: the compiled kernels, where they come from, and building them ahead of time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from ...csrc.build_cache import cache_folder
from ...csrc.jit import Builder
from ...csrc.ops import DEFAULT_ARCH, Resolution, device_arch, export, resolve
from ...csrc.toolchain import find_tools, processor
from ...csrc.units import LIBRARIES, KernelLibrary, library_of
from ...plugins import log
from ...plugins.errors import KernelBuildError, UsageError, did_you_mean
from ..device import cuda_devices
from .parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the subcommands to the parser of `nybble kernels`."""
    commands = parser.add_subparsers(dest="kernels_command", metavar="COMMAND", required=True, prog=parser.prog)
    listing = commands.add_parser("list", help="every compiled op, and where it comes from")
    build = commands.add_parser("build", help="compile libraries now, and keep them in the cache or a folder")
    build.add_argument("libraries", nargs="*", metavar="LIBRARY",
                       help=f"of {', '.join(library.name for library in LIBRARIES)} (default: all)")
    build.add_argument("--out", type=Path, metavar="DIR", help="copy them there: NYBBLE_KERNELS_DIR=DIR uses them")
    why = commands.add_parser("why", help="where an op is looked for, and why it is not there")
    why.add_argument("op", metavar="OP")
    for command in (listing, build, why):
        command.add_argument("--arch", metavar="CC", help="compute capability, as nvcc writes it (default: this "
                             "machine's device, else 90a); libraries for the CPU are for this processor")


def run(parsed: Namespace) -> int:
    """Print what was asked. Returns 0, or 1 when `why` finds no source.

    Raises UsageError for an unknown op or library, KernelBuildError when a build fails.
    """
    log.configure(default="WARNING")
    capability = parsed.arch or (device_arch() if cuda_devices()[0] else DEFAULT_ARCH)
    archs = {"cuda": capability, "cpu": processor()}
    if parsed.kernels_command == "build":
        return _build(_chosen(parsed.libraries), archs, parsed.out)
    return _why(parsed.op, archs) if parsed.kernels_command == "why" else _list(archs)


def _chosen(names: list[str]) -> list[KernelLibrary]:
    known = {library.name: library for library in LIBRARIES}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no kernel library {name!r}", known=known, fix=did_you_mean(name, known))
    return [known[name] for name in names] or list(LIBRARIES)


def _list(archs: Mapping[str, str]) -> int:
    for library in LIBRARIES:
        arch = archs[library.device]
        found = resolve(library, arch)
        state = {None: "not available", "jit": "not built yet"}.get(found.source, f"from {found.source}, {found.path}")
        print(f"{library.name} ({library.target(arch)}): {state}")
        for unit in library.units:
            print(f"  {unit.label:<36}{', '.join(unit.ops)}")
        if found.source is None:
            _print_refusals(found)
    return 0


def _print_refusals(found: Resolution) -> None:
    for source, refusal in found.refusals.items():
        print(f"  {source:<9}no: {refusal}")


def _build(libraries: list[KernelLibrary], archs: Mapping[str, str], out: Path | None) -> int:
    for library in libraries:
        arch = archs[library.device]
        tools, reason = find_tools(library.device)
        if tools is None:
            raise KernelBuildError(f"{library.name} cannot be compiled here", found=reason)
        built = Builder(tools=tools, arch=arch, cache=cache_folder()).build(library)
        for made in built.objects:
            spilled = f", {made.spills} bytes of registers spilled" if made.spills else ""
            print(f"  {made.label:<36}{made.seconds:6.1f} s  {made.size / 1e3:7.0f} kB"
                  f"{'  (cached)' if made.cached else ''}{spilled}")
        path = export(library, arch, built.path, out) if out else built.path
        print(f"{library.name:<38}{built.seconds:6.1f} s  {path.stat().st_size / 1e3:7.0f} kB  {path}")
    return 0


def _why(op: str, archs: Mapping[str, str]) -> int:
    library = library_of(op)
    if library is None:
        known = [op for library in LIBRARIES for op in library.ops]
        raise UsageError(f"there is no compiled op {op!r}", known=known, fix=did_you_mean(op, known))
    arch = archs[library.device]
    found = resolve(library, arch)
    print(f"{op} of {library.name} for {library.target(arch)}")
    _print_refusals(found)
    if found.source is not None:
        print(f"  {found.source:<9}yes: {found.path or 'is built when first needed'}")
    return 0 if found.source is not None else 1
