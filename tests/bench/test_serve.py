"""`bench serve` against a scripted server: what counts as failed, and numbers from known times."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.bench.client import Arrival, Record
from nybble.bench.load import arrival_times
from nybble.bench.serving_metrics import report, summarize
from nybble.bench.workload import make_rng
from nybble.engine.cli import main

TOKENS = 4


def chunk(i: int, *, last: bool = False, error: str = "", chat: bool = False) -> bytes:
    if error:
        return json.dumps({"error": {"message": error}}).encode()
    content = {"delta": {"role": "assistant", "content": "ab"}} if chat else {"text": "ab"}
    return json.dumps({"choices": [{**content, "finish_reason": "length" if last else None}],
                       "usage": {"completion_tokens": i, "prompt_tokens": 5,
                                 "prompt_tokens_details": {"cached_tokens": 2}}}).encode()


def stream(*events: bytes, done: bool = True, form: str = "data: %s\n\n") -> list[bytes]:
    return [form.encode() % event for event in (*events, *([b"[DONE]"] if done else []))]


WHOLE = [*(chunk(i) for i in range(1, TOKENS)), chunk(TOKENS, last=True)]
GOOD = {
    "plain": stream(*WHOLE),
    "crlf": stream(*WHOLE, form="data: %s\r\n\r\n"),
    "no space": stream(*WHOLE, form="data:%s\n\n"),
    "comments": stream(*WHOLE, form=": ping\n\ndata: %s\n\n"),
    "cut anywhere": [bytes([byte]) for byte in b"".join(stream(*WHOLE))],
    "all at once": [b"".join(stream(*WHOLE))],
    "chat": stream(*(chunk(i, last=i == TOKENS, chat=True) for i in range(1, TOKENS + 1))),
}
BAD = {
    "error frame": (stream(*WHOLE[:2], chunk(0, error="boom")), "boom"),
    "named error": ([*stream(*WHOLE[:2], done=False), b'event: error\ndata: {"detail": 1}\n\n'], "detail"),
    "no [DONE]": (stream(*WHOLE, done=False), "without [DONE]"),
    "too short": (stream(*WHOLE[:1], chunk(2, last=True)), "wrong length: 2"),
    "no finish_reason": (stream(*WHOLE[:-1]), "finish_reason is None"),
    "no JSON": (stream(b"{"), "DecodeError"),
    "no tokens": (stream(), "no event had any choices"),
    "HTTP 503": (503, "HTTP 503"),
    "cut off": ([b"data: ", None], "truncated"),
}


class Scripted(BaseHTTPRequestHandler):
    """Tokens are characters; completion number i is answered with `server.script[i]`, the last one for ever."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "fake", "demo": True}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if self.path == "/tokenize" and self.server.tokenizes:
            return self.answer({"tokens": [ord(c) for c in asked["prompt"]]})
        if self.path == "/detokenize":
            return self.answer({"prompt": "".join(map(chr, asked["tokens"]))})
        if not self.path.endswith("completions"):
            return self.answer({}, 404)
        script = self.server.script
        pieces = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(pieces, int):
            return self.answer({"error": {"message": "busy"}}, pieces)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if piece is None:  # a chunk that is announced and never comes
                self.wfile.write(b"5\r\nab")
                self.close_connection = True
                return None
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        return self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as made:
        made.asked, made.script, made.tokenizes = [], [GOOD["plain"]], True
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def bench(server, tmp_path, *flags: str) -> tuple[int, dict]:
    """Exit code and result of three requests."""
    out = tmp_path / "out.json"
    code = main(["bench", "serve", "--base-url", f"http://127.0.0.1:{server.server_port}", "--num-prompts", "3",
                 "--random-input-len", "5", "--random-output-len", str(TOKENS), "--output-json", str(out),
                 "--save-detailed", *flags])
    return code, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.parametrize("name", GOOD)
def test_good_streams_are_counted_whole(server, tmp_path, capsys, name):
    server.script = [GOOD[name]]
    endpoint = "/v1/chat/completions" if name == "chat" else "/v1/completions"
    code, found = bench(server, tmp_path, "--endpoint", endpoint)
    assert code == 0 and found["completed"] == 3 and found["failed"] == 0
    assert found["output_lens"] == [TOKENS] * 3 and found["total_input_tokens"] == 15
    assert [len(gaps) for gaps in found["itls"]] == [TOKENS - 1] * 3
    assert found["generated_texts"] == ["ab" * TOKENS] * 3 and found["total_cached_tokens"] == 6
    assert found["schema"] == 1 and found["toy_model"] and found["model"] == found["model_id"] == "fake"
    assert f"{'Successful requests:':<40} 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", BAD)
def test_bad_streams_are_failures(server, tmp_path, capsys, name):
    pieces, why = BAD[name]
    server.script = [GOOD["plain"], GOOD["plain"], pieces, GOOD["plain"]]  # the first is the test request
    code, found = bench(server, tmp_path, "--max-concurrency", "1")
    assert code == 1 and (found["completed"], found["failed"]) == (2, 1)
    assert found["output_lens"].count(0) == 1 and found["total_output_tokens"] == 2 * TOKENS
    assert sum(why in error for error in found["errors"]) == 1, found["errors"]
    assert why in capsys.readouterr().err


def test_a_server_that_fails_the_test_request_is_not_measured(server, tmp_path, capsys):
    server.script = [503]
    assert bench(server, tmp_path) == (70, {})
    assert "busy" in capsys.readouterr().err


def test_what_is_asked(server, tmp_path):
    bench(server, tmp_path, "--temperature", "0", "--seed", "3")
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    assert {key: asked[0][key] for key in ("model", "max_tokens", "temperature", "ignore_eos", "stream")} == {
        "model": "fake", "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True, "stream": True}
    prompts = [body["prompt"] for body in asked]
    assert all(len(p) == 5 for p in prompts) and len(set(prompts)) == len(prompts) == 4
    server.asked.clear()
    bench(server, tmp_path, "--seed", "3")
    assert {b["prompt"] for path, b in server.asked if path == "/v1/completions"} == set(prompts)


def test_server_without_tokenize_counts_the_prompt_itself(server, tmp_path, capsys):
    server.tokenizes = False
    code, found = bench(server, tmp_path)
    assert code == 0 and found["input_lens"] == [5, 5, 5]
    assert "no /tokenize" in capsys.readouterr().err


def test_saved_under_the_name_of_the_run(server, tmp_path):
    code, _ = bench(server, tmp_path, "--save-result", "--result-dir", str(tmp_path), "--request-rate", "1000")
    (path,) = tmp_path.glob("openai-1000.0qps-fake-*.json")
    assert code == 0 and json.loads(path.read_text())["request_rate"] == 1000.0


@pytest.mark.parametrize("flags", [
    ["--goodput", "speed:1"], ["--goodput", "ttft"], ["--request-rate", "0"], ["--request-rate", "x"],
    ["--percentile-metrics", "p99"], ["--metric-percentiles", "101"], ["--endpoint", "/v1/nothing"],
    ["--base-url", "127.0.0.1:8000"], ["--base-url", "http://me:secret@127.0.0.1"],
    ["--model", "another"], ["--burstiness", "0"],
])
def test_bad_flags(server, tmp_path, flags):
    assert bench(server, tmp_path, *flags) == (2, {})


@given(st.integers(1, 50), st.floats(0.01, 1e4), st.floats(0.001, 100), st.integers(0, 2**32))
def test_arrivals(count, rate, burstiness, seed):
    due = arrival_times(make_rng(seed), count, rate, burstiness)
    assert len(due) == count and due[0] >= 0 and due == sorted(due)
    assert due[-1] == pytest.approx(count / rate)
    assert due == arrival_times(make_rng(seed), count, rate, burstiness)


def test_burstiness_is_the_spread_of_gaps():
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    assert arrival_times(make_rng(0), 3, float("inf"), 1.0) == [0.0] * 3
    for shape in (0.25, 1.0, 16.0):
        gaps = np.diff(arrival_times(make_rng(1), 20_000, 5.0, shape))
        assert gaps.std() / gaps.mean() == pytest.approx(shape**-0.5, rel=0.05)


def record(sent: float, *arrivals: tuple[float, int, str], error: str = "") -> Record:
    """A request whose event with `tokens` so far came at `time`."""
    made = [Arrival(time=time, tokens=tokens, text=text) for time, tokens, text in arrivals]
    return Record(prompt_tokens=10, asked_tokens=arrivals[-1][1], sent=sent, last=arrivals[-1][0], arrivals=made,
                  output_tokens=arrivals[-1][1], error=error)


def test_numbers_by_hand():
    """A role-only event ends TTFT as in vLLM; three tokens in one event are one ITL and three token ITLs."""
    records = [
        record(10.0, (10.1, 0, ""), (10.3, 1, "a"), (10.9, 4, "bcd")),
        record(10.5, (11.0, 1, "x")),
        record(10.0, (10.2, 1, "x"), error="boom"),
    ]
    found = summarize(records, 2.0, goodput={"ttft": 200.0, "tpot": 1000.0}, percentiles=(50.0, 99.5),
                      sections=["ttft", "tpot", "itl", "e2el", "ttft_first_token", "itl_token"])
    exact = {
        "completed": 2, "failed": 1, "total_input_tokens": 20, "total_output_tokens": 5,
        "request_throughput": 1.0, "request_goodput": 0.5, "output_throughput": 2.5, "total_token_throughput": 12.5,
        "max_concurrent_requests": 2, "max_output_tokens_per_s": 3.0,
        "mean_ttft_ms": 300.0, "median_tpot_ms": 800 / 3, "mean_itl_ms": 400.0, "p50_e2el_ms": 700.0,
        "p99.5_e2el_ms": 898.0, "mean_ttft_first_token_ms": 400.0, "mean_itl_token_ms": 200.0, "std_itl_token_ms": 0.0,
    }
    assert {key: found[key] for key in exact} == pytest.approx(exact)
    assert found["output_lens"] == [4, 1, 0] and found["errors"] == ["", "", "boom"]
    lines = report(found | {"client_cpu_percent": 1.0, "p99_client_queue_time_ms": 0.0}, request_rate=2.0,
                   max_concurrency=None, percentiles=(50.0, 99.5))
    assert f"{'P99.5 E2EL (ms):':<40} 898.00    " in lines and f"{'Request goodput (req/s):':<40} 0.50      " in lines
    assert len(lines[0]) == 50 and lines[-1] == "=" * 50


def test_nothing_succeeded():
    found = summarize([record(1.0, (2.0, 1, "x"), error="no")], 1.0, goodput={}, sections=["ttft"], percentiles=(99,))
    assert found["output_throughput"] == 0.0 and "mean_ttft_ms" not in found and found["request_goodput"] is None
