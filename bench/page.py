"""The page of `nybble bench kernels --html`: rooflines and latency curves as inline SVG, without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from ..plugins.errors import UsageError
from .floors import Floors
from .measured import Collector, Measured
from .results import Result

WIDTH, HEIGHT = 420, 300
LEFT, TOP, RIGHT, BOTTOM = 52, 24, 12, 36
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#e377c2", "#bcbd22")
STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1340px;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:12px}td,th{padding:1px 10px 1px 0;text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}
figure{display:inline-block;margin:0 8px 8px 0}svg{background:#fafafa}
text{font:10px system-ui,sans-serif;fill:#444}.t{font-size:12px;fill:#111}.g{stroke:#ddd}.k{margin-right:1.2em}"""


class Axes:
    """Two logarithmic scales that hold every point given."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        xs, ys = zip(*points)
        self.x, self.y = _decades(xs), _decades(ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Of a point, in pixels."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self, title: str, x_name: str, y_name: str) -> str:
        parts = [f'<text class="t" x="{LEFT}" y="14">{escape(title)}</text>',
                 f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>',
                 f'<text x="4" y="{TOP - 2}">{escape(y_name)}</text>']
        for power in range(math.ceil(self.x[0]), math.floor(self.x[1]) + 1):
            x, _ = self.place(10.0**power, 10.0 ** self.y[0])
            parts.append(f'<path class="g" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
                         f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{_number(power)}</text>')
        for power in range(math.ceil(self.y[0]), math.floor(self.y[1]) + 1):
            _, y = self.place(10.0 ** self.x[0], 10.0**power)
            parts.append(f'<path class="g" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                         f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{_number(power)}</text>')
        return "".join(parts)

    def line(self, points: Sequence[tuple[float, float]], color: str, dash: str = "") -> str:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.place(*point) for point in points))
        return f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5" stroke-dasharray="{dash}"/>'

    def dot(self, x: float, y: float, color: str, told: str) -> str:
        across, down = self.place(x, y)
        return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{color}"><title>{escape(told)}</title></circle>'


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The logarithms between which all values lie, not too near to the edge."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.05 * (high - low), 0.15)
    return low - margin, high + margin


def _number(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"


def write_page(path: Path, result: Result, collector: Collector) -> None:
    """Write the page. Raises UsageError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(result, collector), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the page to {path}", found=error) from error


def page(result: Result, collector: Collector) -> str:
    """Everything that was measured, as one document."""
    rows, floors = collector.rows, collector.floors
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(row.kernel for row in rows))}
    where = result.device.gpu or result.device.cpu
    rates = ", ".join(f"{kind} {rate / 1e12:.1f} T/s" for kind, rate in floors.operations.items())
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>nybble kernels on {escape(where)}</title>"
        f"<style>{STYLE}</style><h1>Kernels on {escape(where)}</h1><p>{escape(result.date)}; commit "
        f"{escape(result.commit or 'none')}; torch {escape(result.torch)}; <code>{escape(result.command)}</code><br>"
        f"measured in the same run: {floors.bandwidth / 1e9:.0f} GB/s, {escape(rates)}</p><p>",
        *(f'<span class=k style="color:{color}">&#9679; {escape(name)}</span>' for name, color in colors.items()),
        '<span class=k style="color:#999">- - floor</span></p>',
    ]
    for family, of_family in groupby(rows, key=lambda row: row.family):
        listed = list(of_family)
        parts += [f"<h2>{escape(family)}</h2>", roofline(family, listed, floors, colors)]
        by_case: dict[str, list[Measured]] = {}
        for row in listed:
            by_case.setdefault(row.case, []).append(row)
        parts += [curve(case, cases, floors, colors) for case, cases in by_case.items()
                  if len({row.size for row in cases}) > 1]
        parts.append(table(listed, floors))
    for title, told in (("Not right, so not timed", collector.wrong),
                        ("Not run", [f"{what}: {why}" for what, why in collector.absent.items()])):
        if told:
            parts.append(f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(line)}' for line in told)}</ul>")
    return "\n".join(parts) + "</html>\n"


def _figure(content: str) -> str:
    return f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img">{content}</svg></figure>'


def roofline(title: str, rows: Sequence[Measured], floors: Floors, colors: dict[str, str]) -> str:
    """Operations a second over operations a byte, under what the device can do of each."""
    points = [(row.operations / row.moved, row.operations / row.median / 1e12, row) for row in rows]
    kinds = {row.kind: floors.operations[row.kind] / 1e12 for row in rows}
    slope, most = floors.bandwidth / 1e12, max(kinds.values())
    left, right = min(x for x, _, _ in points), max(*(x for x, _, _ in points), 4 * most / slope)
    axes = Axes([(x, y) for x, y, _ in points] + [(left, left * slope), (right, most)])
    roofs = [axes.line([(left, left * slope), (rate / slope, rate), (right, rate)] if left * slope < rate
                       else [(left, rate), (right, rate)], "#999", "4 3") for rate in kinds.values()]
    dots = [axes.dot(x, y, colors[row.kernel], f"{row.case} {row.kernel} {row.size}: {1e6 * row.median:.1f} us")
            for x, y, row in points]
    return _figure(axes.grid(f"{title}: roofline", "operations a byte", "T/s") + "".join(roofs + dots))


def curve(case: str, rows: Sequence[Measured], floors: Floors, colors: dict[str, str]) -> str:
    """Microseconds over size, a line for each kernel, and the lowest floor at each size."""
    least: dict[int, float] = {}
    for row in rows:
        floor = 1e6 * floors.seconds(row.moved, row.operations, row.kind)
        least[row.size] = min(floor, least.get(row.size, floor))
    lines = {name: sorted((row.size, 1e6 * row.median) for row in rows if row.kernel == name)
             for name in dict.fromkeys(row.kernel for row in rows)}
    axes = Axes([*least.items(), *(point for points in lines.values() for point in points)])
    parts = [axes.line(sorted(least.items()), "#999", "4 3")]
    for name, points in lines.items():
        parts += [axes.line(points, colors[name]),
                  *(axes.dot(size, us, colors[name], f"{name} {size}: {us:.1f} us") for size, us in points)]
    return _figure(axes.grid(case, "size", "us") + "".join(parts))


def table(rows: Sequence[Measured], floors: Floors) -> str:
    """What is drawn, in numbers."""
    body = []
    for row in rows:
        least = floors.seconds(row.moved, row.operations, row.kind)
        cells = (row.case, row.kernel, row.size, f"{1e6 * row.median:.1f}", f"{1e6 * least:.1f}",
                 f"{least / row.median:.0%}", f"{row.moved / row.median / 1e9:.0f}",
                 f"{row.operations / row.median / 1e12:.1f}", "-" if row.error is None else f"{row.error:.2f}",
                 row.note)
        body.append("<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in cells))
    head = "".join(f"<th>{name}" for name in ("case", "kernel", "size", "us", "floor", "share", "GB/s", "T/s", "error",
                                              ""))
    return f"<details><summary>{len(rows)} measurements</summary><table><tr>{head}{''.join(body)}</table></details>"
