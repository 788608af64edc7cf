"""The load report: every linear layer and what runs it, how attention is computed, and why not by anything else."""

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


class AttentionReport(msgspec.Struct, frozen=True, kw_only=True):
    """How all layers of attention are computed.

    Attributes:
        backend: its name. layers: how many there are. cache: the dtype of keys and values.
        parts: what of the work has, or might have, a kernel of its own -> which one runs it, and why not another.
        refusals: every other backend -> why it is not used.
    """

    backend: str
    layers: int
    cache: str
    parts: dict[str, str]
    refusals: dict[str, str]

    def __str__(self) -> str:
        parts = "".join(f"; {part}: {how}" for part, how in self.parts.items())
        return f"{self.backend}, cache in {self.cache}{parts}"


def render(layers: Sequence[LayerReport], attention: AttentionReport | None, form: str) -> str:
    """As "table" or "json"."""
    return as_json(layers, attention) if form == "json" else as_table(layers, attention)


def as_json(layers: Sequence[LayerReport], attention: AttentionReport | None) -> str:
    """{"layers": [...], "attention": {...}}, indented."""
    return msgspec.json.format(msgspec.json.encode({"layers": layers, "attention": attention}), indent=1).decode()


def summary(layers: Sequence[LayerReport]) -> str:
    """One line: how many layers are stored in what way and run by which kernel, the most bytes first."""
    kinds: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault((layer.scheme, layer.kernel), []).append(layer)
    sizes = {kind: sum(layer.bytes for layer in group) for kind, group in kinds.items()}
    told = (f"{len(kinds[kind])} {kind[0]} by {kind[1]} ({sizes[kind] / 1e6:.1f} MB)"
            for kind in sorted(kinds, key=sizes.__getitem__, reverse=True))
    return ", ".join(told)


def as_table(layers: Sequence[LayerReport], attention: AttentionReport | None) -> str:
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
    if attention is not None:
        lines += ["", f"attention of {attention.layers} layers by {attention}"]
        lines += [f"  {name}: {why}" for name, why in attention.refusals.items()]
    return "\n".join(lines)


def _kind(layer: LayerReport) -> tuple[str, str, str, tuple[int, int], tuple[tuple[str, str], ...]]:
    name = ".".join("*" if part.isdigit() else part for part in layer.layer.split("."))
    return name, layer.scheme, layer.kernel, layer.shape, tuple(layer.refusals.items())
