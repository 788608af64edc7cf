"""Expert statistics: the derived numbers, and the three forms they are shown in."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.expert_stats import (
    SHADES,
    ExpertCounts,
    as_heat_map,
    as_html,
    as_json,
    as_table,
    check_counting,
    check_experts,
    from_json,
)
from nybble.plugins.errors import UsageError

LAYERS = st.lists(st.builds(ExpertCounts, layer=st.text(max_size=12),
                            counts=st.lists(st.integers(0, 2**60), min_size=1, max_size=9)), min_size=1, max_size=4)
SKEWED = ExpertCounts(layer="model.layers.0.<experts>", counts=[6, 0, 2, 0])


class Page(HTMLParser):
    """Fails on a tag that closes nothing or is left open; keeps rows of cells and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.fetched = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.fetched += [(tag, name) for name, _ in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(("counts", "total", "imbalance", "variation", "dead", "busiest"), [
    ([6, 0, 2, 0], 8, 3.0, 1.2247, [1, 3], 0),
    ([5, 5, 5], 15, 1.0, 0.0, [], 0),
    ([0, 0], 0, 0.0, 0.0, [0, 1], 0),
    ([0, 7], 7, 2.0, 1.0, [0], 1),
])
def test_derived_numbers(counts, total, imbalance, variation, dead, busiest):
    layer = ExpertCounts(layer="x", counts=counts)
    assert (layer.total, layer.dead, layer.busiest) == (total, dead, busiest)
    assert (layer.imbalance, layer.variation) == pytest.approx((imbalance, variation), abs=1e-4)


@given(LAYERS)
def test_every_form_has_every_layer(layers):
    assert from_json(as_json(layers)) == layers
    assert as_table(layers).count("\n") == sum(layer.layer.count("\n") for layer in layers) + len(layers) + 1
    page = Page(as_html(layers, "<model> & co"))
    assert not page.fetched and len(page.rows) == len(layers) + 1
    widest = max(len(layer.counts) for layer in layers)
    for layer, cells in zip(layers, page.rows[1:], strict=True):
        assert len(cells) == widest
        for number, count in enumerate(layer.counts):
            told = f"{layer.layer}, expert {number}: {count} tokens"
            assert cells[number]["title"].replace("\r", "\n").startswith(told.replace("\r", "\n"))
            assert (cells[number].get("class") == "dead") == (number in layer.dead)


def test_the_table_and_the_map_show_the_numbers():
    row = as_table([SKEWED]).splitlines()[1].split()
    assert row == ["model.layers.0.<experts>", "4", "8", "3.00", "1.22", "0", "(75.0%)", "1", "3"]
    page = as_html([SKEWED], "toy")
    assert "<experts>" not in page and "http" not in page and "color-scheme: light dark" in page
    assert re.findall(r"--load:([\d.]+)", page.partition("</style>")[2]) == ["1.000", "0.333"]
    assert as_table([ExpertCounts(layer="x", counts=[0] * 12)]).splitlines()[1].endswith("0 1 2 3 4 5 6 7 and 4 more")


def test_what_cannot_be_asked():
    with pytest.raises(UsageError, match="--expert-stats"):
        check_counting(False)
    with pytest.raises(UsageError, match="no experts"):
        check_experts([])


@given(LAYERS)
def test_a_heat_map_shows_every_expert_and_no_token_only_where_there_is_none(layers):
    named = [msgspec.structs.replace(layer, layer=f"layer {i}") for i, layer in enumerate(layers)]
    for line, layer in zip(as_heat_map(named).splitlines()[1:-1], named, strict=True):
        cells = line.partition("|")[2].rstrip("|").split("|")
        assert len(cells) == len(layer.counts)
        for cell, count in zip(cells, layer.counts):
            assert len(cell) == 2 and (cell == 2 * SHADES[0]) is (count == 0)
