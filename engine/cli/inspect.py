"""`nybble inspect`: what a checkpoint is and what would keep it from loading, from headers alone."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import groupby
from typing import TYPE_CHECKING

from .parser import Parser, add_engine_flags, engine_args

if TYPE_CHECKING:
    from ..inspection import Inspection, Layer

REFUSED = 3


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="everything, one row per layer")
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Print the account; exit 3 when loading would refuse the checkpoint."""
    from ...plugins.manager import PluginHost
    from ..demo import resolve_demo
    from ..inspection import inspect_checkpoint

    args, _ = engine_args(parsed)
    host = PluginHost.load(prefer=args.prefer, strict=args.strict_plugins)
    found = inspect_checkpoint(resolve_demo(args).create_engine_config(host), host)
    print(json.dumps(found.as_dict(), indent=1) if parsed.json else as_text(found))
    return REFUSED if found.problems else 0


def as_text(found: Inspection) -> str:
    method = f"{found.quantization} ({found.evidence or 'while it is loaded'})" if found.quantization else "none"
    total = sum(found.bytes_by_role.values())
    lines = [
        f"folder        {found.folder}",
        f"architecture  {found.architecture}",
        f"quantization  {method}",
        f"files         {len(found.files)}, {found.file_bytes / 1e6:.1f} MB",
        f"in memory     {total / 1e6:.1f} MB: "
        + ", ".join(f"{role} {size / 1e6:.1f}" for role, size in found.bytes_by_role.items()),
        *_kv_scales(found.kv_scales),
        "",
        f"{'layers':<56} {'method':<22} {'stored as':<44} MB",
    ]
    lines += [_row(list(group)) for _, group in groupby(sorted(found.layers, key=_kind), key=_kind)]
    for title, entries in (("would be refused", found.problems), ("worth a look", found.findings)):
        if entries:
            lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def _kv_scales(names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    kinds = dict.fromkeys(name.partition("self_attn.")[2] or name for name in names)
    return [f"KV scales     {len(names)} ({', '.join(kinds)}): used with --kv-cache-dtype fp8"]


def _kind(layer: Layer) -> tuple[str, str, str]:
    """Layers that differ in their number alone are one row."""
    name = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
    return name, layer.method, layer.scheme


def _row(layers: list[Layer]) -> str:
    name, method, scheme = _kind(layers[0])
    count = f" x{len(layers)}" if len(layers) > 1 else ""
    return f"{name + count:<56} {method:<22} {scheme:<44} {sum(layer.bytes for layer in layers) / 1e6:.2f}"
