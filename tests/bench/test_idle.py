"""What a trace says of idle time, by hand and by a slower sum; and the command on a toy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.bench.idle import Span, capture_report, graph_metrics, read_trace, union
from nybble.bench.results import read_json
from nybble.engine.cli import main


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_union_counts_every_moment_once(spans):
    moments = {at for start, length in spans for at in range(start, start + length)}
    assert union((start, start + length) for start, length in spans) == len(moments)


def test_trace_by_hand():
    spans = [
        Span("gemm", 100, 300, True), Span("norm", 250, 400, True),  # two streams
        Span("Memcpy HtoD (Pinned -> Device)", 500, 600, True), Span("gemm", 900, 1100, True),
        Span("cudaLaunchKernel", 0, 2000, False), Span("cudaEventSynchronize", 1000, 1500, False),
        Span("cudaMemcpyAsync", 1400, 1700, False), Span("cudaMemcpyAsync", 1800, 1810, False),
    ]
    found = read_trace(spans, steps=2)
    assert found == (pytest.approx(0.4), pytest.approx(0.3), 1.5, 0.5, pytest.approx(0.35))
    assert read_trace(spans[4:5], 1) == (None, None, 0.0, 0.0, 0.0)


class Captured(msgspec.Struct):
    seconds: float
    sizes: list[int]


class Named(NamedTuple):
    bytes: int


@pytest.mark.parametrize(("report", "shown"), [
    (None, None), ({"seconds": 1.0}, {"seconds": 1.0}), ("4 graphs", "4 graphs"),
    (Captured(1.5, [1, 2]), {"seconds": 1.5, "sizes": [1, 2]}), (lambda: {"n": 3}, {"n": 3}),
    (Named(7), {"bytes": 7}),
], ids=["none", "dict", "text", "struct", "method", "tuple"])
def test_graphs_are_reported_where_the_engine_says(report, shown):
    client = SimpleNamespace(core=SimpleNamespace(executor=SimpleNamespace(worker=SimpleNamespace(
        runner=SimpleNamespace(capture_report=report)))))
    assert capture_report(SimpleNamespace(llm_engine=SimpleNamespace(client=client))) == shown
    numbers = {key for key, value in shown.items() if not isinstance(value, list)} if isinstance(shown, dict) else set()
    assert {*graph_metrics(shown)} == {f"graphs/{key}" for key in numbers}
    assert capture_report(SimpleNamespace(llm_engine=SimpleNamespace(client=None))) is None


def test_command(tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["bench", "idle", "--models", "tiny", "--num-seqs", "1,3", "--num-steps", "4", "--num-steps-warmup",
                 "1", "--prompt-len", "5", "--device", "cpu", "--num-gpu-blocks-override", "64", "--output-json",
                 str(out)]) == 0
    found = read_json(out)
    keys = ("step", "plan", "host", "kernels", "copies")
    assert {f"tiny/{n}/{key}" for n in (1, 3) for key in keys} <= {*found.metrics}
    assert found.metrics["tiny/1/step"].n == 4 and found.toy_model
    if found.device.gpu is None:
        assert "tiny/1/idle" not in found.metrics and " - " in capsys.readouterr().out


@pytest.mark.gpu
def test_a_device_is_seen_at_work(tmp_path):
    out = tmp_path / "r.json"
    assert main(["bench", "idle", "--models", "tiny", "--num-seqs", "2", "--num-steps", "5", "--prompt-len", "5",
                 "--device", "cuda", "--num-gpu-blocks-override", "64", "--output-json", str(out)]) == 0
    found = {name: metric.median for name, metric in read_json(out).metrics.items()}
    assert 0 <= found["tiny/2/idle"] < 1 <= found["tiny/2/kernels"] and found["tiny/2/host"] > 0
