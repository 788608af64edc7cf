"""`nybble bench compare`: two result files side by side; exit code 1 when the second is worse."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from ..engine.cli.parser import Parser
from ..plugins.errors import UsageError
from .results import WIDE, Metric, Result, read_json

REGRESSION = 1
SAME = ("name", "model", "toy_model", "device", "workload")


class Row(NamedTuple):
    """One metric in both files. `ratio` is B over A; `low` and `high` are what the spreads leave possible."""

    name: str
    a: Metric
    b: Metric
    ratio: float
    low: float
    high: float
    regressed: bool


def main(argv: list[str]) -> int:
    """Print the ratios. 0: no metric of B is worse than A's by more than the threshold; 1: one is."""
    parser = Parser(
        prog="nybble bench compare",
        usage="nybble bench compare A.json B.json [--threshold SHARE]",
        description="Compare the medians of two results of one benchmark, A before and B after.",
    )
    parser.add_argument("a", metavar="A.json", type=Path)
    parser.add_argument("b", metavar="B.json", type=Path)
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.05,
        metavar="SHARE",
        help="how much worse a median may be [default: 5%%]",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare results of different models, devices or workloads all the same",
    )
    parsed = parser.parse(argv)
    a, b = read_json(parsed.a), read_json(parsed.b)
    if (differ := differences(a, b)) and not parsed.force:
        raise UsageError(
            "these results do not measure the same thing",
            found="; ".join(differ),
            fix="measure both on one machine with one command, or --force",
        )
    rows = compare(a, b, parsed.threshold)
    print_rows(rows, a, b)
    return REGRESSION if any(row.regressed for row in rows) else 0


def fraction(text: str) -> float:
    """ "5%" or "0.05" as 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{text!r} is not a share such as 5%")
    return value


def differences(a: Result, b: Result) -> list[str]:
    """What makes two results incomparable, in words."""
    return [
        f"{field} {getattr(a, field)!r} and {getattr(b, field)!r}"
        for field in SAME
        if getattr(a, field) != getattr(b, field)
    ]


def compare(a: Result, b: Result, threshold: float) -> list[Row]:
    """The metrics that both have. Raises UsageError when there is none."""
    names = [name for name in a.metrics if name in b.metrics]
    if not names:
        raise UsageError("the results have no metric in common", found=f"{[*a.metrics]} and {[*b.metrics]}")
    return [_row(name, a.metrics[name], b.metrics[name], threshold) for name in names]


def _row(name: str, a: Metric, b: Metric, threshold: float) -> Row:
    worse = b.median < a.median * (1 - threshold) if a.better == "higher" else b.median > a.median * (1 + threshold)
    return Row(name, a, b, _over(b.median, a.median), _over(b.min, a.max), _over(b.max, a.min), worse)


def _over(b: float, a: float) -> float:
    return b / a if a else 1.0 if b == a else float("inf")


def print_rows(rows: list[Row], a: Result, b: Result) -> None:
    """The table, and which metrics only one of the files has."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", box=None, pad_edge=False)
    for title in ("A", "B", "B/A", "range"):
        table.add_column(title, justify="right")
    table.add_column("unit")
    table.add_column("")
    for row in rows:
        verdict = f"worse ({row.a.better} is better)" if row.regressed else ""
        table.add_row(
            row.name,
            f"{row.a.median:.5g}",
            f"{row.b.median:.5g}",
            f"{row.ratio:.3f}",
            f"{row.low:.3f} .. {row.high:.3f}",
            row.a.unit,
            verdict,
        )
    console = Console(width=WIDE, soft_wrap=True, highlight=False)
    console.print(table)
    for title, mine, other in (("A", a, b), ("B", b, a)):
        if alone := [name for name in mine.metrics if name not in other.metrics]:
            console.print(f"only in {title}: {', '.join(alone)}")
