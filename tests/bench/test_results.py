"""The result schema: statistics, the stamp, files there and back, and `bench compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.bench.compare import compare, fraction
from nybble.bench.results import SCHEMA, Metric, Result, make_result, read_json, write_json
from nybble.engine.cli import main
from nybble.plugins.errors import UsageError

FLOATS = st.floats(-1e9, 1e9)


def metric(median: float, *, better: str = "higher", spread: float = 0.0) -> Metric:
    return Metric(median=median, min=median - spread, max=median + spread, n=3, unit="tok/s", better=better)


def result(**changes: Any) -> Result:
    made = make_result("throughput", ["some model", "--seed", "1"], model="m", toy_model=False, device="cpu",
                       workload={"num_prompts": 4}, metrics={"speed": metric(100.0)})
    return msgspec.structs.replace(made, **changes)


@given(st.lists(FLOATS, min_size=1, max_size=30), st.lists(st.floats(0, 100), max_size=4))
def test_metric_is_numpys(values, percentiles):
    made = Metric.of(values, "s", better="lower", percentiles=percentiles)
    assert (made.median, made.min, made.max, made.n) == (np.median(values), min(values), max(values), len(values))
    assert made.percentiles == {f"{p:g}": np.percentile(values, p) for p in percentiles}


def test_stamp_says_where_and_how():
    made = result()
    assert made.schema == SCHEMA and made.command == "nybble bench throughput 'some model' --seed 1"
    assert made.device.cores >= 1 and made.device.cpu and made.device.gpu is None
    assert made.torch.startswith("2.") and made.date.endswith("+00:00")


def test_file_round_trip(tmp_path):
    made = result(metrics={"speed": Metric.of([1.5, 2.5], "tok/s", better="higher", percentiles=(99,))})
    write_json(tmp_path / "deep" / "r.json", made, {"completed": 3, "schema": "overruled"})
    assert read_json(tmp_path / "deep" / "r.json") == made
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["completed"] == 3


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 1, "name": "x"}', "nonsense"])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError):
        read_json(tmp_path / "r.json")


def test_every_committed_result_can_be_read():
    for path in (Path(__file__).parents[2] / "bench" / "results").glob("*.json"):
        assert read_json(path).metrics


def run_compare(tmp_path: Path, a: Result, b: Result, *flags: str) -> int:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (a, b)):
        write_json(path, content)
    return main(["bench", "compare", *map(str, paths), *flags])


@pytest.mark.parametrize(("better", "after", "threshold", "code"), [
    ("higher", 96.0, "5%", 0),
    ("higher", 94.0, "5%", 1),
    ("higher", 94.0, "0.1", 0),
    ("higher", 300.0, "5%", 0),
    ("lower", 104.0, "5%", 0),
    ("lower", 106.0, "5%", 1),
    ("lower", 1.0, "0%", 0),
])
def test_compare_exit_code(tmp_path, capsys, better, after, threshold, code):
    a, b = (result(metrics={"speed": metric(median, better=better)}) for median in (100.0, after))
    assert run_compare(tmp_path, a, b, "--threshold", threshold) == code
    printed = capsys.readouterr().out
    assert f"{after / 100:.3f}" in printed and ("worse" in printed) == bool(code)


@pytest.mark.parametrize("changes", [
    {"toy_model": True}, {"model": "other"}, {"name": "latency"}, {"workload": {"num_prompts": 5}},
    {"device": msgspec.structs.replace(result().device, cpu="another")},
])
def test_compare_refuses_what_differs(tmp_path, capsys, changes):
    assert run_compare(tmp_path, result(), result(**changes)) == 2
    assert next(iter(changes)) in capsys.readouterr().err
    assert run_compare(tmp_path, result(), result(**changes), "--force") == 0


def test_compare_range_covers_the_spreads():
    a, b = (result(metrics={"speed": metric(m, spread=10.0)}) for m in (100.0, 90.0))
    (row,) = compare(a, b, 0.05)
    assert (row.ratio, row.low, row.high) == (0.9, 80 / 110, 100 / 90)
    with pytest.raises(UsageError, match="no metric in common"):
        compare(a, result(metrics={}), 0.05)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0)])
def test_threshold(text, value):
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["", "five", "-1%", "100%", "nan"])
def test_bad_threshold(text, tmp_path, capsys):
    assert run_compare(tmp_path, result(), result(), f"--threshold={text}") == 2
    assert "share" in capsys.readouterr().err
