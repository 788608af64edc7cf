"""Expert statistics: how often every expert of every layer was chosen, as numbers, table, JSON and heat map."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean, pstdev
from typing import Any

import msgspec

from ..plugins.errors import UsageError


class ExpertCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of experts. Every computed token, of a prompt or generated, adds one to each of its top_k experts;
    a token that is computed again after a preemption counts again, one found in the prefix cache does not.

    Attributes:
        layer: its name in the model: "model.layers.0.block_sparse_moe.experts".
        counts: tokens of each expert since the engine was ready or the counts were last reset.
    """

    layer: str
    counts: list[int]

    @property
    def total(self) -> int:
        """Tokens x top_k."""
        return sum(self.counts)

    @property
    def imbalance(self) -> float:
        """The busiest expert's tokens over the mean; 1 is an even load, 0 means that nothing was counted."""
        return max(self.counts) / fmean(self.counts) if self.total else 0.0

    @property
    def variation(self) -> float:
        """Coefficient of variation: the counts' standard deviation over their mean; 0 where nothing was counted."""
        return pstdev(self.counts) / fmean(self.counts) if self.total else 0.0

    @property
    def dead(self) -> list[int]:
        """The experts that no token went to."""
        return [number for number, count in enumerate(self.counts) if not count]

    @property
    def busiest(self) -> int:
        """The expert with the most tokens, the first of equals."""
        return self.counts.index(max(self.counts))

    def as_dict(self) -> dict[str, Any]:
        """What was counted and what follows from it, of plain values."""
        return {"layer": self.layer, "counts": self.counts, "total": self.total, "imbalance": self.imbalance,
                "variation": self.variation, "dead": self.dead}


def check_counting(counting: bool) -> None:
    """Raises UsageError when the engine was not told to count."""
    if not counting:
        raise UsageError("this engine does not count the tokens of its experts", found="--expert-stats is off",
                         fix="start it with --expert-stats (EngineArgs.expert_stats=True)")


def check_experts(layers: list[ExpertCounts]) -> list[ExpertCounts]:
    """`layers`, unless there are none. Raises UsageError."""
    if not layers:
        raise UsageError("this model has no experts to count the tokens of", fix="ask a mixture-of-experts model")
    return layers


def as_json(layers: Sequence[ExpertCounts]) -> bytes:
    """{"layers": [ExpertCounts.as_dict, ...]}."""
    return msgspec.json.encode({"layers": [layer.as_dict() for layer in layers]})


def from_json(data: bytes) -> list[ExpertCounts]:
    """What `as_json` wrote. Raises ValueError."""
    return msgspec.json.decode(data, type=dict[str, list[ExpertCounts]])["layers"]


def as_table(layers: Sequence[ExpertCounts]) -> str:
    """One row per layer, and what the columns mean."""
    width = max([len("layer"), *(len(layer.layer) for layer in layers)])
    lines = [f"{'layer':<{width}}  experts       counts  max/mean   CV   busiest          dead"]
    for layer in layers:
        share = max(layer.counts) / layer.total if layer.total else 0.0
        busiest = f"{layer.busiest} ({share:.1%})" if layer.total else "-"
        lines.append(f"{layer.layer:<{width}}  {len(layer.counts):>7} {layer.total:>12} {layer.imbalance:>9.2f} "
                     f"{layer.variation:>5.2f} {busiest:<16} {_dead(layer)}")
    return "\n".join([*lines, "counts: tokens x experts per token; max/mean: 1 is an even load; "
                              "CV: standard deviation over mean; dead: experts without a token"])


def _dead(layer: ExpertCounts, shown: int = 8) -> str:
    more = [f"and {len(layer.dead) - shown} more"] if len(layer.dead) > shown else []
    return " ".join([*map(str, layer.dead[:shown]), *more]) or "-"


SHADES = " .:-=+*#%@"


def as_heat_map(layers: Sequence[ExpertCounts]) -> str:
    """A terminal's heat map: a row per layer, two characters per expert, darker for more of the layer's tokens."""
    peak = max((layer.imbalance for layer in layers), default=0.0)
    width = max([len("layer"), *(len(layer.layer) for layer in layers)])
    lines = [f"{'layer':<{width}}  experts 0 to {max((len(layer.counts) for layer in layers), default=1) - 1}"]
    for layer in layers:
        mean = layer.total / len(layer.counts) or 1.0
        shades = (max(1, round(count / mean / peak * (len(SHADES) - 1))) if count else 0 for count in layer.counts)
        lines.append(f"{layer.layer:<{width}}  |" + "|".join(2 * SHADES[shade] for shade in shades) + "|")
    return "\n".join([*lines, f"{'':<{width}}  '{SHADES[0]}' no token, '{SHADES[-1]}' {peak:.2f} times an even share"])


STYLE = """
:root { color-scheme: light dark; --hot: 210 90 30; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: CanvasText; background: Canvas; }
table { border-collapse: collapse; margin: 1em 0; }
th { font-weight: normal; text-align: left; padding: 0 .6em; white-space: nowrap; }
th.n { text-align: right; font-variant-numeric: tabular-nums; }
thead th { opacity: .7; }
td { min-width: 14px; height: 20px; padding: 0; border: 1px solid rgb(128 128 128 / .25);
     background: rgb(var(--hot) / var(--load)); }
td:hover { outline: 2px solid CanvasText; }
td.dead { background: repeating-linear-gradient(45deg, transparent 0 3px, rgb(128 128 128 / .6) 3px 4px); }
.bar { display: inline-block; width: 12em; height: 1em; vertical-align: middle; border: 1px solid rgb(128 128 128 / .5);
       background: linear-gradient(to right, transparent, rgb(var(--hot))); }
"""


def as_html(layers: Sequence[ExpertCounts], title: str) -> str:
    """A page of its own, in light or dark: layers down, experts across, a cell as strong as its load; numbers on hover.

    A cell's load is its count over the mean of its layer, and the strongest colour is the largest load of all layers.
    """
    peak = max((layer.imbalance for layer in layers), default=0.0)
    experts = max((len(layer.counts) for layer in layers), default=0)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("layer", "counts", "max/mean", "CV", "dead"))
    rows = "\n".join(_row(layer, peak, experts) for layer in layers)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}: experts</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}: tokens of every expert</h1>
<p>Load of an expert over its layer's mean: 0 <span class="bar"></span> {peak:.2f}.
Hatched: dead, no token at all. Point at a cell for its numbers; experts count from 0, left to right.</p>
<p>counts: tokens x experts per token. max/mean: 1 is an even load. CV: standard deviation over mean.</p>
<table>
<thead><tr>{heads}<th scope="col" colspan="{experts}">experts 0 to {experts - 1}</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def _row(layer: ExpertCounts, peak: float, experts: int) -> str:
    mean = layer.total / len(layer.counts)
    cells = []
    for number, count in enumerate(layer.counts):
        load = count / mean if mean else 0.0
        told = f"{layer.layer}, expert {number}: {count} tokens"
        told += f", {load:.2f} of the mean, {count / layer.total:.2%} of the layer" if count else ", dead"
        how = f'style="--load:{load / peak:.3f}"' if count else 'class="dead"'
        cells.append(f'<td {how} title="{escape(told)}"></td>')
    numbers = (str(layer.total), f"{layer.imbalance:.2f}", f"{layer.variation:.2f}", str(len(layer.dead)))
    return (f'<tr><th scope="row">{escape(layer.layer)}</th>' + "".join(f'<th class="n">{n}</th>' for n in numbers)
            + "".join(cells) + "<td></td>" * (experts - len(layer.counts)) + "</tr>")
