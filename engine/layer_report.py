"""The load report: what every linear layer is, which kernel runs it, and why no other does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgspec


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One linear layer as it was loaded.

    Attributes:
        layer: its name, fused parts joined by +: "model.layers.0.mlp.gate_proj+up_proj".
        scheme: how it is stored: "int4 g128 zp", or a dtype where it is not quantized.
        kernel: what runs it; "reference" is its method's own arithmetic.
        shape: (out_features, in_features).
        bytes: of its tensors in memory.
        refusals: every other kernel -> why it does not run this layer.
    """

    layer: str
    scheme: str
    kernel: str
    shape: tuple[int, int]
    bytes: int
    refusals: dict[str, str]


def render(layers: Sequence[LayerReport], form: str) -> str:
    """As "table" or "json"."""
    return as_json(layers) if form == "json" else as_table(layers)


def as_json(layers: Sequence[LayerReport]) -> str:
    """{"layers": [...]}, indented."""
    return msgspec.json.format(msgspec.json.encode({"layers": layers}), indent=1).decode()


def summary(layers: Sequence[LayerReport]) -> str:
    """One line: how many layers are stored in what way and run by which kernel, the most bytes first."""
    kinds: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault((layer.scheme, layer.kernel), []).append(layer)
    sizes = {kind: sum(layer.bytes for layer in group) for kind, group in kinds.items()}
    told = (f"{len(kinds[kind])} {kind[0]} by {kind[1]} ({sizes[kind] / 1e6:.1f} MB)"
            for kind in sorted(kinds, key=sizes.__getitem__, reverse=True))
    return ", ".join(told)


def as_table(layers: Sequence[LayerReport]) -> str:
    """Layers that differ in their number alone are one row; each distinct set of refusals is told once."""
    kinds = [list(group) for _, group in groupby(sorted(layers, key=_kind), key=_kind)]
    lines = [f"{'layers':<44} {'outputs x inputs':<16} {'stored as':<36} {'kernel':<14} {'MB':>9}"]
    for group in kinds:
        first = group[0]
        name = _kind(first)[0] + (f" x{len(group)}" if len(group) > 1 else "")
        shape = f"{first.shape[0]} x {first.shape[1]}"
        size = sum(layer.bytes for layer in group) / 1e6
        lines.append(f"{name:<44} {shape:<16} {first.scheme:<36} {first.kernel:<14} {size:9.2f}")
    lines.append(f"{'total':<113} {sum(layer.bytes for layer in layers) / 1e6:9.2f}")
    told: dict[tuple[str, ...], list[str]] = {}
    for group in kinds:
        if group[0].refusals:
            reasons = (f"  {name}: {why}" for name, why in group[0].refusals.items())
            told.setdefault((f"{group[0].kernel} runs {group[0].scheme}", *reasons), []).append(_kind(group[0])[0])
    for (what, *because), names in told.items():
        lines += ["", f"why {what} ({', '.join(names)}):", *because]
    return "\n".join(lines)


def _kind(layer: LayerReport) -> tuple[str, str, str, tuple[int, int], tuple[tuple[str, str], ...]]:
    name = ".".join("*" if part.isdigit() else part for part in layer.layer.split("."))
    return name, layer.scheme, layer.kernel, layer.shape, tuple(layer.refusals.items())
