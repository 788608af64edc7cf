"""The README's code map is true: every name stands in a file that the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "README.md").read_text().partition("## Code map")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (.+?) \| (.+?) \|$", MAP, re.M)[1:]


def files_of(cell: str) -> list[Path]:
    """Paths in a cell; a bare file name is in the folder of the path before it."""
    paths: list[Path] = []
    for text in re.findall(r"`([^`]+)`", cell):
        path = ROOT / text if "/" in text else paths[-1].parent / text
        paths += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return paths


@pytest.mark.parametrize("names, where", ROWS, ids=[row[0][:40] for row in ROWS])
def test_names_are_where_the_map_says(names, where):
    files = files_of(where)
    assert files and all(path.is_file() for path in files), where
    text = "\n".join(path.read_text() for path in files)
    for name in re.findall(r"`([A-Za-z_.]+)`", names):
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text), f"{part} is not in {where}"


def test_the_map_is_not_empty():
    assert len(ROWS) > 30
