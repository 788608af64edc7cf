"""SQNR as grids, layers down and experts or matrices across: what the terminal and the page both draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .outliers import numbers_of
from .report import Comparison
from .sqnr import Sqnr


class Grid(NamedTuple):
    """Cells (row, column) -> SQNR, or None where nothing was measured; what is not there has no cell."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Sqnr | None]


def grids(comparison: Comparison) -> list[Grid]:
    """Of experts' weights and outputs, and of all other matrices; those that have cells."""
    weights: dict[tuple[str, str], Sqnr | None] = {}
    others: dict[tuple[str, str], Sqnr | None] = {}
    for matrix in comparison.matrices:
        layer, expert, rest = numbers_of(matrix.name)
        if layer is None:
            others["model", rest] = matrix.sqnr
        elif expert is None:
            others[f"layer {layer}", rest] = matrix.sqnr
        else:
            at = f"layer {layer}", str(expert)
            held = weights.get(at)
            weights[at] = matrix.sqnr if held is None or matrix.sqnr.level < held.level else held
    outputs = {(f"layer {expert.layer}", str(expert.expert)): expert.sqnr for expert in comparison.experts}
    made = [
        _grid("SQNR of each expert's weights, the worst of its matrices (dB)", weights),
        _grid("SQNR of each expert's outputs, given the reference's inputs (dB)", outputs),
        _grid("SQNR of the other matrices' weights (dB)", others),
    ]
    return [grid for grid in made if grid.cells]


def _grid(title: str, cells: dict[tuple[str, str], Sqnr | None]) -> Grid:
    return Grid(title, _unique(row for row, _ in cells), _unique(column for _, column in cells), cells)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def shown(cell: Sqnr | None) -> str:
    """ "21.4", "inf", "-inf", or "-" where nothing was measured."""
    return "-" if cell is None else f"{cell.level:.1f}"


def shade(cell: Sqnr | None) -> float:
    """0 (broken, or 0 dB and less) to 1 (40 dB and more)."""
    return 0.0 if cell is None else min(max(cell.level / 40, 0.0), 1.0)
