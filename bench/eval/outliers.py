"""Which matrices, experts and layers are far noisier than their peers: named, so that nobody has to search a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from ...engine.loader.problems import template
from .report import ExpertSqnr, LayerSqnr, MatrixSqnr, Outlier
from .sqnr import Sqnr

PLACE = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\.(.*))?")
EXPERT = re.compile(r".*\bexperts\.(\d+)(?:\.(.*))?")
PEERS = 4  # fewer say nothing of what is usual
STEP_DB = 6.0  # the least that counts as far: twice the noise's amplitude
SPREADS = 6.0  # median absolute deviations, about four standard deviations
GOOD_DB = 40.0  # an error of one percent is nobody's fault, however exact the others are
CEILING_DB = 200.0  # stands for exact and, negated, for broken


class Reading(NamedTuple):
    """One SQNR and its peers: those of one `kind`, or where these are few, of one `family`."""

    what: str
    name: str
    kind: str
    family: str
    sqnr: Sqnr


def numbers_of(name: str) -> tuple[int | None, int | None, str]:
    """(layer, expert, what is left) of a checkpoint name.

    "model.layers.1.block_sparse_moe.experts.5.w2" -> (1, 5, "w2"); "lm_head" -> (None, None, "lm_head").
    """
    match = PLACE.fullmatch(name)
    if match is None:
        return None, None, name
    rest = match[2] or ""
    expert = EXPERT.fullmatch(rest)
    return (int(match[1]), None, rest) if expert is None else (int(match[1]), int(expert[1]), expert[2] or "")


def place(name: str) -> str:
    """ "layer 1 expert 5 w2"."""
    layer, expert, rest = numbers_of(name)
    words = [f"layer {layer}"] * (layer is not None) + [f"expert {expert}"] * (expert is not None) + [rest] * bool(rest)
    return " ".join(words)


def find(layers: Sequence[LayerSqnr], experts: Sequence[ExpertSqnr], matrices: Sequence[MatrixSqnr]) -> list[Outlier]:
    """Every outlier, the worst first."""
    readings = [
        *(Reading("weights", m.name, f"{template(m.name)} {m.stored}", m.stored, m.sqnr) for m in matrices),
        *(Reading("expert outputs", e.name, f"experts of layer {e.layer}", "experts", e.sqnr)
          for e in experts if e.sqnr is not None),
        *(Reading("layer outputs", f"layers.{one.layer}", "layers", "layers", one.same) for one in layers),
    ]
    found = [outlier for what in dict.fromkeys(r.what for r in readings)
             for outlier in _among([r for r in readings if r.what == what])]
    return sorted(found, key=lambda o: -CEILING_DB if o.db is None else o.db)


def _among(readings: Sequence[Reading]) -> Iterator[Outlier]:
    kinds, families = _group(readings, "kind"), _group(readings, "family")
    for kind in kinds.values():
        yield from _low(kind, kind if len(kind) >= PEERS else families[kind[0].family])


def _group(readings: Sequence[Reading], by: str) -> dict[str, list[Reading]]:
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(getattr(reading, by), []).append(reading)
    return groups


def _low(readings: Iterable[Reading], peers: Sequence[Reading]) -> Iterator[Outlier]:
    """Those of `readings` that lie far below the median of their `peers`."""
    if len(peers) < PEERS:
        return
    levels = sorted(map(_level, peers))
    usual = median(levels)
    spread = median(abs(level - usual) for level in levels)
    for reading in readings:
        if _level(reading) < min(GOOD_DB, usual - max(STEP_DB, SPREADS * spread)):
            others = _median_without_a_low_one(levels)
            yield Outlier(what=reading.what, name=reading.name, place=place(reading.name), db=reading.sqnr.db,
                          others_db=None if others >= CEILING_DB else others)


def _level(reading: Reading) -> float:
    return max(-CEILING_DB, min(CEILING_DB, reading.sqnr.level))


def _median_without_a_low_one(levels: Sequence[float]) -> float:
    """The median of sorted `levels` less any one that lies below it."""
    at, odd = divmod(len(levels), 2)
    return (levels[at] + levels[at + 1]) / 2 if odd else levels[at]
