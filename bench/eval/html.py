"""The report as one page of HTML: no script, nothing fetched, drawings in SVG, light or dark as the reader likes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as entities

from .grid import Grid, grids, shade, shown
from .report import CheckpointInfo, Comparison, Histogram, Report, RouterAgreement, Score, TaskScore, perplexity

CELL, LABEL, BAR, LINE = 34, 90, 320, 20
STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0 1.4em; }
th, td { text-align: right; padding: .15em .8em; border-bottom: 1px solid rgb(128 128 128 / .3);
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.t { text-align: left; }
code { overflow-wrap: anywhere; }
.bad { color: #c33; font-weight: 600; }
.wide { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: CanvasText; }
svg .in { fill: #fff; text-anchor: middle; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .model { fill: #2b6cb0; }
svg .reference { fill: #999; }
"""


def escape(text: str) -> str:
    """Text for the page; what a model wrote may hold characters that no page may, which are shown as "\\x07"."""
    return entities("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def to_html(report: Report) -> str:
    """The whole page; well-formed XML as well."""
    parts = [_sides(report), _failed(report)]
    if report.comparison is not None:
        parts.append(_outliers(report.comparison))
    if report.tasks:
        parts.append(_tasks(report.tasks))
    if report.comparison is not None:
        parts.append(_comparison(report.comparison))
    parts.append(f"<p><code>{escape(report.command)}</code><br/>{escape(report.date)}, "
                 f"{escape(report.device.gpu or report.device.cpu)}, "
                 + escape(", ".join(f"{name} {version}" for name, version in report.libraries.items())) + "</p>")
    title = escape(f"nybble eval: {report.model.name}")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(filter(None, parts))
            + "\n</body></html>\n")


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _sides(report: Report) -> str:
    sides = [("model", report.model)] + ([("reference", report.reference)] if report.reference else [])
    return _table(("", "name", "architecture", "quantization", "matrices stored as", "MB", "SHA-256 of the weights"),
                  ((title, *_side(side)) for title, side in sides))


def _side(side: CheckpointInfo) -> tuple[str, ...]:
    return (side.name + (" (a toy model)" if side.toy_model else ""), side.architecture, side.quantization or "none",
            ", ".join(f"{name} x{count}" for name, count in side.schemes.items()), f"{side.weight_bytes / 1e6:.1f}",
            ", ".join(f"{name} {digest[:16]}…" for name, digest in side.sha256.items()))


def _failed(report: Report) -> str:
    return "".join(f'<p class="bad">Failed: {escape(line)}</p>' for line in report.failed)


def _outliers(found: Comparison) -> str:
    if not found.outliers:
        return "<p>No matrix, expert or layer is far noisier than its peers.</p>"
    lines = "".join(f'<li class="bad">{escape(str(outlier))} <code>{escape(outlier.name)}</code></li>'
                    for outlier in found.outliers)
    return f"<h2>Far noisier than their peers</h2><ul>{lines}</ul>"


def _tasks(tasks: list[TaskScore]) -> str:
    bars, y = [], 0
    for task in tasks:
        label = f"{task.task} ({task.split})" if task.split else task.task
        bars.append(f'<text class="end" x="{2 * LABEL - 8}" y="{y + 14}">{escape(label)}</text>')
        for kind, score in (("model", task.model), ("reference", task.reference)):
            if score is not None:
                bars.append(_bar(kind, score, y))
                y += LINE
        y += 6
    wrong = [(task.task, one.asked, one.got, one.expected) for task in tasks for one in task.model.wrong]
    return ("<h2>Exact match</h2>" + _svg(2 * LABEL + BAR + 140, y, bars)
            + (_table(("wrong answers", "asked", "got", "expected"), wrong) if wrong else ""))


def _bar(kind: str, score: Score, y: int) -> str:
    width = max(1, round(BAR * score.share))
    return (f'<rect class="{kind}" x="{2 * LABEL}" y="{y + 2}" width="{width}" height="{LINE - 4}"/>'
            f'<text x="{2 * LABEL + width + 6}" y="{y + 14}">{100 * score.share:.1f} % ({score.right}/{score.total}) '
            f"{kind}</text>")


def _comparison(found: Comparison) -> str:
    tokens = _table(
        ("tokens of", "scored", "KL mean", "median", "99 %", "max", "same top-1", "perplexity", "reference's"),
        ((d.task, str(d.tokens), *(f"{v:.4g}" for v in (d.kl_mean, d.kl_p50, d.kl_p99, d.kl_max)),
          f"{100 * d.top1:.2f} %", f"{perplexity(d.nll_model):.5g}", f"{perplexity(d.nll_reference):.5g}")
         for d in found.divergence))
    layers = _table(
        ("layer", "SQNR alone", "with noise from below", "same experts alone", "same first", "same experts with noise",
         "same first"),
        ((str(one.layer), str(one.same), str(one.own), *_shares(one.router)) for one in found.layers))
    return (f"<h2>Next-token distributions</h2><p>KL(reference || model) in nats; {found.tokens} tokens went through "
            f"the layers, in {escape(found.dtype)}.</p>{tokens}{_histogram(found.histogram)}"
            f"<h2>Layers</h2><p>Alone: given the reference's hidden states.</p>{layers}"
            + "".join(f"<h2>{escape(grid.title)}</h2>{_heat_map(grid)}" for grid in grids(found)))


def _shares(router: RouterAgreement | None) -> tuple[str, ...]:
    if router is None:
        return ("",) * 4
    shares = (router.same_set, router.same_top1, router.own_set, router.own_top1)
    return tuple(f"{100 * share:.2f} %" for share in shares)


def _histogram(histogram: Histogram) -> str:
    most, height, step = max(histogram.counts, default=0) or 1, 120, 48
    drawn = []
    for i, count in enumerate(histogram.counts):
        tall = round(height * count / most)
        drawn.append(f'<rect class="model" x="{i * step + 10}" y="{height + 16 - tall}" width="{step - 4}" '
                     f'height="{tall}"><title>{count} tokens</title></rect>'
                     f'<text class="mid" x="{i * step + 8 + step // 2}" y="{height + 12 - tall}">{count or ""}</text>')
    drawn += [f'<text class="mid" x="{i * step + 8}" y="{height + 32}">{10.0 ** edge:g}</text>'
              for i, edge in enumerate(histogram.edges)]
    return f"<p>Tokens by KL:</p>{_svg(len(histogram.edges) * step, height + 40, drawn)}"


def _heat_map(grid: Grid) -> str:
    wide = max(CELL, 7 * max(map(len, grid.columns)))
    drawn = [f'<text class="mid" x="{LABEL + x * wide + wide // 2}" y="12">{escape(name)}</text>'
             for x, name in enumerate(grid.columns)]
    for y, row in enumerate(grid.rows):
        drawn.append(f'<text class="end" x="{LABEL - 8}" y="{y * LINE + 34}">{escape(row)}</text>')
        for x, column in enumerate(grid.columns):
            if (row, column) in grid.cells:
                drawn.append(_cell(grid, (row, column), LABEL + x * wide, y * LINE + 20, wide))
    return _svg(LABEL + len(grid.columns) * wide, len(grid.rows) * LINE + 24, drawn)


def _cell(grid: Grid, at: tuple[str, str], x: int, y: int, wide: int) -> str:
    value = grid.cells[at]
    colour = "#888" if value is None else f"hsl({round(15 + 195 * shade(value))} 60% 38%)"
    told = f"{at[0]}, {at[1]}: " + ("no token" if value is None else str(value))
    return (f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{LINE - 1}" fill="{colour}">'
            f"<title>{escape(told)}</title></rect>"
            f'<text class="in" x="{x + wide // 2}" y="{y + 14}">{shown(value)}</text>')


def _svg(width: int, height: int, drawn: Iterable[str]) -> str:
    return (f'<div class="wide"><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
            + "\n".join(drawn) + "</svg></div>")
