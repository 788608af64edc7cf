"""Names of built kernels by content: what a source includes, hashes of it, and files published whole."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..plugins import env
from .units import KernelLibrary, Unit

# Part of every name: raise it when the meaning of a built file changes without its sources changing.
FORMAT = "1"
SOURCES = Path(__file__).parent
QUOTED_INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def cache_folder() -> Path:
    """Where built objects and libraries are kept."""
    return env.cache_dir() / "kernels"


def digest(parts: Iterable[str | bytes]) -> str:
    """A hash of a sequence of strings, which no other sequence has."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(b"%d:" % len(data) + data)
    return total.hexdigest()


def included(source: Path, root: Path = SOURCES) -> list[Path]:
    """`source` and all files below `root` that it includes by quotes, transitively; others' headers are not ours."""
    found: dict[Path, None] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        for name in QUOTED_INCLUDE.findall(path.read_bytes()):
            places = [folder / os.fsdecode(name) for folder in (path.parent, root)]
            waiting += [place.resolve() for place in places if place.is_file()][:1]
    return sorted(found)


def content(source: str, root: Path = SOURCES) -> str:
    """A hash of a source, its name, and all that it includes of ours."""
    paths = included(root / source, root)
    return digest([source, *(part for path in paths for part in (path.name, path.read_bytes()))])


def unit_content(unit: Unit, root: Path = SOURCES) -> str:
    return digest([content(unit.source, root), *unit.defines, str(unit.cutlass)])


def file_name(library: KernelLibrary, arch: str, root: Path = SOURCES) -> str:
    """The name of a built library that says all that its user must agree with: device and sources.

    The tools that built it are left out: a library may have been built elsewhere.
    """
    stamp = digest([FORMAT, content(library.binding, root), *(unit_content(unit, root) for unit in library.units)])
    return f"{library.name}-{library.target(arch)}-{stamp[:16]}.so"


def publish(built: Path, place: Path) -> Path:
    """Move a finished file to its place in one step: whoever sees it sees it whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    built.chmod(0o755)  # whatever the folder it was made in allowed
    return built.replace(place)
