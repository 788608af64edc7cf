"""The report on a terminal, what is worst first."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..results import WIDE
from .grid import Grid, grids, shade, shown
from .report import Comparison, Report, Score, TaskScore, perplexity, totals

WORST = 10  # matrices listed
WRONG = 2  # answers shown of each task
SHORT = 60  # characters of each
MOST_COLUMNS = 24  # of a grid: more experts do not fit a line


def print_report(report: Report, console: Console | None = None) -> None:
    """Everything that fits a terminal; all of it is in --json and --html."""
    console = console or Console(width=WIDE, soft_wrap=True, highlight=False)
    for title, side in (("model", report.model), ("reference", report.reference)):
        if side is not None:
            schemes = ", ".join(f"{name} x{count}" for name, count in side.schemes.items())
            toy = " (a toy model)" if side.toy_model else ""
            console.print(Text(f"{title:<10} {side.name}{toy}: {side.architecture}, "
                               f"{side.quantization or 'not quantized'}, {side.weight_bytes / 1e6:.1f} MB ({schemes})"))
    if report.tasks:
        console.print(tasks_table(report.tasks))
        _print_wrong(console, report.tasks)
    if report.comparison is not None:
        _print_comparison(console, report.comparison)
    for line in report.failed:
        console.print(Text(f"FAILED: {line}", style="bold red"))


def _table(*titles: str, names: int = 1) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < names else "right")
    return table


def tasks_table(tasks: list[TaskScore]) -> Table:
    """Exact match by task, the worst first, and the sum of every split."""
    table = _table("task", "split", "exact match", "reference", "skipped", names=2)
    for task in sorted(tasks, key=lambda t: t.model.share):
        table.add_row(task.task, task.split, _share(task.model), _share(task.reference), str(task.skipped or ""))
    for split, (model, reference) in totals(tasks).items():
        table.add_row("all", split, _share(model), _share(reference), "")
    return table


def _share(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{100 * score.share:.1f} % ({score.right}/{score.total})" if score.total else "none asked"


def _print_wrong(console: Console, tasks: list[TaskScore]) -> None:
    for task in tasks:
        for wrong in task.model.wrong[:WRONG]:
            asked, got, expected = (repr(text if len(text) <= SHORT else text[:SHORT] + "...")
                                    for text in (wrong.asked, wrong.got, wrong.expected))
            console.print(Text(f"  {task.task}: asked {asked}, got {got}, expected {expected}", style="dim"))


def _print_comparison(console: Console, found: Comparison) -> None:
    console.print(Text(f"\nagainst the reference, in {found.dtype}, over {found.tokens} tokens:"))
    table = _table("tokens of", "scored", "KL mean", "p50", "p99", "max", "top-1", "perplexity", "reference's")
    first, *rest = found.divergence
    for row in (first, *sorted(rest, key=lambda d: -d.kl_mean)):
        kl = (row.kl_mean, row.kl_p50, row.kl_p99, row.kl_max)
        table.add_row(row.task, str(row.tokens), *(f"{v:.3g}" for v in kl), f"{100 * row.top1:.1f} %",
                      *(f"{perplexity(v):.4g}" for v in (row.nll_model, row.nll_reference)))
    console.print(table)
    table = _table("layer", "SQNR alone", "SQNR with noise from below", "same experts alone", "first", "with noise",
                   "first")
    for layer in sorted(found.layers, key=lambda one: one.same.level):
        router = layer.router
        shares = (router.same_set, router.same_top1, router.own_set, router.own_top1) if router else ()
        table.add_row(str(layer.layer), str(layer.same), str(layer.own), *(f"{100 * share:.1f} %" for share in shares))
    console.print(table)
    for grid in grids(found):
        if len(grid.columns) <= MOST_COLUMNS:
            console.print(Text(grid.title))
            console.print(_heat_map(grid))
    table = _table(f"worst {WORST} matrices", "stored as", "SQNR", names=2)
    for matrix in sorted(found.matrices, key=lambda m: m.sqnr.level)[:WORST]:
        table.add_row(matrix.name, matrix.stored, str(matrix.sqnr))
    console.print(table)
    for outlier in found.outliers:
        console.print(Text(f"suspicious: {outlier}", style="bold red"))


def _heat_map(grid: Grid) -> Table:
    table = _table("", *grid.columns)
    for row in grid.rows:
        cells = ((row, column) for column in grid.columns)
        table.add_row(row, *(_cell(grid, at) for at in cells))
    return table


def _cell(grid: Grid, at: tuple[str, str]) -> Text:
    if at not in grid.cells:
        return Text("")
    share = shade(grid.cells[at])
    red, blue = round(200 * (1 - share)), round(60 + 140 * share)
    return Text(shown(grid.cells[at]).rjust(5), style=f"white on #{red:02x}46{blue:02x}")
