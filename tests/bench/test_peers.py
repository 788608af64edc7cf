"""The suite beside another engine: its floors are the published ones, and a toy runs it from end to end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from nybble.bench import offline
from nybble.bench.floors import Floors
from nybble.bench.peers import H100, MODELS, OTHERS, TINY_WORKLOADS, WORKLOADS, floor_of, sizes
from nybble.bench.results import read_json
from nybble.engine.cli import main
from nybble.plugins.errors import CheckpointError

# What the goals were set by: milliseconds at 1 and 32 requests, prompt tokens per second.
FLOORS = {
    "llama3-8b-fp8": (2.69, 2.96, 104093), "llama3-8b-awq": (1.57, 1.84, 57169), "llama3-8b-bf16": (5.01, 5.28, 57169),
    "mixtral-8x7b-gptq": (2.28, 8.41, 31625), "mixtral-8x7b-fp8": (4.30, 15.85, 57583),
    "dsv2-lite-fp8": (0.89, 5.10, 324593),
}
SLOW = Floors(bandwidth=1e9, operations={"float": 1e9, "fp8_e4m3": 1e9, "int8": 1e9})


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name):
    config = {**MODELS, **OTHERS}[name].config
    found = [floor_of(config, WORKLOADS[workload], H100) for workload in ("bs1", "bs32", "prefill")]
    assert found == [pytest.approx(floor, abs=0.005 if floor < 1000 else 0.5) for floor in FLOORS[name]]
    assert floor_of(config, WORKLOADS["mixed"], H100) is None


def test_fewer_experts_lower_the_floor():
    config, workload = MODELS["dsv2-lite-fp8"].config, WORKLOADS["bs32"]
    uniform = floor_of(config, workload, H100)
    assert floor_of(config, workload, H100, hit=sizes(config).expected_experts(32)) == uniform
    assert floor_of(config, workload, H100, hit=20) < uniform / 2


def test_the_shapes_are_those_the_peer_ran(tmp_path, monkeypatch):
    script = Path(__file__).parents[3] / "shared" / "peers" / "make_configs.py"
    if not script.is_file():
        pytest.skip(f"no {script}")
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path)])
    spec = importlib.util.spec_from_file_location("make_configs", script)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for name in FLOORS:
        config = json.loads((tmp_path / name / "config.json").read_text())
        if name.endswith("fp8"):  # which the peer leaves out without being told
            config["quantization_config"]["ignored_layers"] = ["lm_head"]
        assert {**MODELS, **OTHERS}[name].config == config


def test_suite_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "measure_floors", lambda device: SLOW)
    out = tmp_path / "r.json"
    assert main(["bench", "offline", "--suite", "peers", "--models", "tiny", "--repeat", "3", "--device", "cpu",
                 "--num-gpu-blocks-override", "64", "--output-json", str(out)]) == 0
    found, printed = read_json(out), capsys.readouterr().out
    counts = {"bs1": 3, "bs32": 3, "prefill": 3, "mixed": 3, "bs1/hit": 4, "bs32/hit": 4, "start_cold": 1,
              "start_warm": 1}
    assert {name.removeprefix("tiny/"): metric.n for name, metric in found.metrics.items()} == counts
    assert found.toy_model and found.metrics["tiny/prefill"].better == "higher"
    assert found.metrics["tiny/bs1/hit"].median == 2 <= found.metrics["tiny/bs32/hit"].median <= 4
    rows = printed.rpartition(offline.COLUMNS)[2].split("\n")
    assert [row.split()[1] for row in rows if row] == list(counts)  # the table comes whole at the end
    floor = floor_of(OTHERS["tiny"].config, TINY_WORKLOADS["bs1"], SLOW)
    assert f"{floor:.4g}" in rows[1].split()


def test_a_cell_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "measure_floors", lambda device: SLOW)
    timed = offline.time_workload

    def time_workload(llm, shape, repeat):
        if shape is TINY_WORKLOADS["bs1"]:
            raise CheckpointError("no luck")
        assert json.loads(out.read_text())["metrics"] if shape is TINY_WORKLOADS["mixed"] else True  # kept at once
        return timed(llm, shape, repeat)

    monkeypatch.setattr(offline, "time_workload", time_workload)
    out = tmp_path / "r.json"
    assert main(["bench", "offline", "--models", "tiny", "--workloads", "bs1,prefill,mixed", "--no-hits", "--device",
                 "cpu", "--num-gpu-blocks-override", "64", "--output-json", str(out)]) == 1
    assert list(read_json(out).metrics) == ["tiny/prefill", "tiny/mixed"]
    assert json.loads(out.read_text())["failures"] == ["tiny/bs1: CheckpointError: no luck"]
    assert "tiny               bs1         failed: CheckpointError: no luck" in capsys.readouterr().out


@pytest.mark.gpu
def test_suite_on_a_device(tmp_path):
    out = tmp_path / "r.json"
    assert main(["bench", "offline", "--models", "tiny", "--device", "cuda", "--num-gpu-blocks-override", "64",
                 "--output-json", str(out)]) == 0
    assert len(read_json(out).metrics) == 8 and read_json(out).device.gpu


@pytest.mark.parametrize("words", [["--models", "gpt"], ["--workloads", "bs2"], ["folder"], ["--suite", "other"]])
def test_refused(words, capsys):
    assert main(["bench", "offline", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")
