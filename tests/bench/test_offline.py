"""The benchmarks that run an engine themselves, at sizes where only the bookkeeping is at stake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nybble.bench import startup
from nybble.bench.cli import BENCHMARKS
from nybble.bench.results import read_json
from nybble.bench.startup import StartupArgs, llm_seconds, serve_seconds
from nybble.bench.step import StepArgs, measure
from nybble.bench.transformers_peer import (
    PeerArgs,
    Request,
    Shape,
    check_agreement,
    load_peer,
    make_checkpoint,
    run,
    run_peer,
)
from nybble.bench.workload import make_rng, random_lengths
from nybble.engine.cli import main
from nybble.plugins.errors import NybbleError

SHAPE = Shape(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
              intermediate_size=16, vocab_size=64, max_position_embeddings=64)
SMALL = ["--cpu-threads", "1", "--num-gpu-blocks-override", "64", "--max-model-len", "64"]


@pytest.mark.parametrize(("command", "flags", "metrics"), [
    ("latency", ["--batch-size", "2", "--output-len", "3", "--baseline-output-len", "1"],
     {"batch_latency": 2, "decode_step": 2}),
    ("latency", ["--output-len", "3", "--disable-detokenize"], {"batch_latency": 2}),
    ("throughput", ["--num-prompts", "5", "--output-len", "3", "--random-range-ratio", "0.5"],
     {f"{name}_per_s": 2 for name in ("requests", "prompt_tokens", "output_tokens", "total_tokens")}),
])
def test_command_writes_its_metrics(llama, tmp_path, capsys, command, flags, metrics):
    out = tmp_path / "r.json"
    assert main(["bench", command, str(llama), "--input-len", "4", "--num-iters", "2", "--num-iters-warmup", "1",
                 "--output-json", str(out), *flags, *SMALL]) == 0
    found = read_json(out)
    assert {name: metric.n for name, metric in found.metrics.items()} == metrics
    assert found.name == command and found.model == llama.name and not found.toy_model
    assert found.workload["input_len"] == 4 and found.device.threads == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in metrics)


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_a_context_too_short_is_refused(llama, capsys, command):
    lengths = ["--input-len", "60", "--output-len", "30"]
    assert main(["bench", command, str(llama), "--num-iters", "1", *lengths, *SMALL]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", [["nothing"], ["latency", "--baseline-output-len", "500"],
                                   ["throughput", "--num-prompts", "0"], ["step", "--num-seq", "3"]])
def test_usage_errors(words):
    assert main(["bench", *words]) == 2


def test_help_names_every_benchmark_and_imports_no_torch():
    code = "import sys; from nybble.engine.cli import main; main(['bench', '--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and all(f"  {name} " in shown.stdout for name in BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_has_a_help_page(name, capsys):
    assert main(["bench", name, "--help"]) == 0
    assert f"nybble bench {name}" in capsys.readouterr().out


def test_lengths_stay_in_their_range():
    lengths = random_lengths(make_rng(-1), 500, 10, 0.3)
    assert set(lengths) == set(range(7, 14)) and random_lengths(make_rng(0), 3, 1, 1.0) <= [2, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_step_adds_up(temperature):
    metrics = measure(StepArgs(num_seqs=3, prompt_len=20, num_steps=17, num_steps_warmup=1, temperature=temperature))
    assert {m.n for m in metrics.values()} == {17} and all(m.min >= 0 for m in metrics.values())
    assert metrics["step"].min >= metrics["schedule"].min and metrics["all"].max >= metrics["step"].max


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    make_checkpoint(folder, SHAPE, 0)
    return folder


def test_peer_comparison(tmp_path, capsys):
    args = PeerArgs(num_prompts=3, min_len=2, max_len=6, batch_size=2, single_len=4, threads=1, repeats=2)
    metrics = run(tmp_path, SHAPE, args)
    assert "agree on 4 requests" in capsys.readouterr().out and {m.n for m in metrics.values()} == {2}
    speed = {side: metrics[f"{side}_tokens_per_s"].median for side in ("nybble", "transformers")}
    assert all(value > 0 for value in speed.values()) and metrics["speedup_single"].median > 0


def test_padding_does_not_change_what_the_peer_says(checkpoint, transformers_greedy):
    requests = [Request(prompt=list(range(1, n)), output_len=n) for n in (9, 2, 5)]
    alone = [transformers_greedy(checkpoint, [r.prompt], r.output_len)[0] for r in requests]
    assert run_peer(load_peer(checkpoint), requests, batch_size=2) == alone


def test_agreement_tells_ties_from_errors(checkpoint):
    model, request = load_peer(checkpoint), Request(prompt=[3, 1, 4], output_len=2)
    [theirs] = run_peer(model, [request], 1)
    assert check_agreement(model, [request], [theirs], [theirs]) == 0
    with pytest.raises(NybbleError, match="other greedy tokens"):
        check_agreement(model, [request], [[theirs[0], (theirs[1] + 1) % 64]], [theirs])
    with torch.no_grad():  # equal rows make equal logits
        model.lm_head.weight.copy_(model.lm_head.weight[:1].expand_as(model.lm_head.weight))
    assert check_agreement(model, [request], [[5, 6]], [[5, 7]]) == 1


def test_startup_is_measured_to_the_first_good_answer(monkeypatch, tmp_path):
    server = ("import sys, http.server as h; H = type('H', (h.BaseHTTPRequestHandler,), {'do_GET': lambda s: "
              "(s.send_response(200 if s.path == '/health' else 404), s.end_headers())}); "
              "h.HTTPServer(('127.0.0.1', int(sys.argv[-1])), H).serve_forever()")
    monkeypatch.setattr(startup, "SERVE", ("-c", server))
    monkeypatch.setattr(startup, "OFFLINE", "print('ready')")
    out = tmp_path / "r.json"
    assert main(["bench", "startup", "--repeats", "1", "--output-json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["metrics"]) == {"serve_cold", "serve_warm", "llm_cold", "llm_warm"} and found["toy_model"]


@pytest.mark.parametrize("seconds", [serve_seconds, llm_seconds])
def test_a_start_that_fails_says_why(seconds, tmp_path):
    with pytest.raises(NybbleError, match=r"exit code \d+[\s\S]*no/such/model"):
        seconds(StartupArgs(model="no/such/model"), str(tmp_path))
