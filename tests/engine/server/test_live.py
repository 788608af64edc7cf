"""The server on a real engine in its own process, with the embedded toy model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

openai = pytest.importorskip("openai", reason="the openai package is a dev dependency")

PROGRAM = """
import sys
from nybble.engine.args import EngineArgs
from nybble.engine.server.app import serve
from nybble.engine.server.args import ServerArgs
if __name__ == "__main__":
    engine = EngineArgs(max_model_len=256, num_gpu_blocks_override=64, max_queue=8, cpu_threads=1)
    sys.exit(serve(engine, ServerArgs(port=int(sys.argv[1]), shutdown_timeout=5)))
"""


class Live:
    def __init__(self, script: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.popen = subprocess.Popen(
            [sys.executable, script, str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def wait(self, *statuses: int) -> None:
        """Until /health has one of these statuses."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.popen.poll() is None:
            try:
                if self.http.get("/health").status_code in statuses:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.popen.kill()
        pytest.fail(f"the server did not get there:\n{self.popen.communicate()[1]}")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("live") / "serve.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def fresh(script):
    server = Live(script)
    yield server
    server.popen.kill()
    server.popen.communicate()


@pytest.fixture(scope="module")
def live(script):
    server = Live(script)
    server.wait(200)
    yield server
    server.popen.kill()
    server.popen.communicate()


ASK = {"model": "nybble-demo", "prompt": "12+34=", "max_tokens": 12, "temperature": 0}


def test_stream_and_whole_say_the_same(live):
    whole = live.openai.completions.create(**ASK, logprobs=3)
    chunks = list(
        live.openai.completions.create(**ASK, logprobs=3, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens == live.http.post("/tokenize", json={"prompt": "12+34="}).json()["count"]
    streamed = [x for c in chunks[:-1] if c.choices[0].logprobs for x in c.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs)


def test_an_echoed_prompt_is_scored(live):
    answer = live.openai.completions.create(**{**ASK, "max_tokens": 0}, echo=True, logprobs=2)
    scores = answer.choices[0].logprobs
    assert (
        answer.choices[0].text == ASK["prompt"] == "".join(scores.tokens)
        and answer.usage.completion_tokens == 0
    )
    assert scores.token_logprobs[0] is None and all(x < 0 for x in scores.token_logprobs[1:])
    assert all(len(top) in (2, 3) for top in scores.top_logprobs[1:])


def test_bytes_of_characters_are_scored_apart(live):
    answer = live.openai.completions.create(**{**ASK, "prompt": "é=中", "max_tokens": 1}, echo=True, logprobs=3)
    scores = answer.choices[0].logprobs
    assert scores.tokens[:-1] == [*(rf"bytes:\x{byte:x}" for byte in b"\xc3\xa9"), "=",
                                  *(rf"bytes:\x{byte:x}" for byte in "中".encode())]
    assert scores.text_offset == [0, 0, 1, 2, 2, 2, 3]
    assert all(len(top) in (3, 4) for top in scores.top_logprobs[1:])


def test_samples_differ_and_are_numbered(live):
    answer = live.openai.completions.create(**{**ASK, "temperature": 1.5}, n=4, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3] and len({c.text for c in answer.choices}) > 1
    chunks = list(live.openai.completions.create(**{**ASK, "temperature": 1.5}, n=4, seed=1, stream=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(4)]
    assert texts == [c.text for c in answer.choices]


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "a" * 300}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"prompt": "a", "logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"prompt": "a", "allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ],
)
def test_the_engine_names_what_it_refuses(live, body, param):
    response = live.http.post("/v1/completions", json={"max_tokens": 2, **body})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param)


def test_leaving_frees_the_blocks(live):
    body = {"prompt": "1", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while 'nybble:num_requests_running{model_name="nybble-demo"} 0.0' not in live.http.get("/metrics").text:
        assert time.monotonic() < deadline
        live.openai.completions.create(**ASK)  # a step brings fresh numbers
    assert live.http.get("/load").json() == {"server_load": 0}


def test_everything_listens_on_loopback_or_not_at_all(live):
    process = psutil.Process(live.popen.pid)
    tree = [process, *process.children(recursive=True)]
    listening = {
        c.laddr.ip for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"} and len(tree) > 1


def test_sigterm_leaves_nothing_behind(live):
    children = psutil.Process(live.popen.pid).children(recursive=True)
    live.popen.send_signal(signal.SIGTERM)
    assert live.popen.wait(5) == 143
    assert not psutil.wait_procs(children, 2)[1]
    assert "serves nybble-demo" in live.popen.stderr.read()


def test_sigterm_while_loading_leaves_nothing_behind(fresh):
    fresh.wait(503)
    children = psutil.Process(fresh.popen.pid).children(recursive=True)
    fresh.popen.send_signal(signal.SIGTERM)
    assert fresh.popen.wait(2) == 143
    assert not psutil.wait_procs(children, 2)[1]


def test_killing_the_engine_ends_streams_and_the_server(fresh):
    fresh.wait(200)
    [engine] = psutil.Process(fresh.popen.pid).children()
    body = {"prompt": "1", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with fresh.http.stream("POST", "/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        engine.send_signal(signal.SIGKILL)
        *_, error, done = lines
    assert json.loads(error[6:])["error"]["code"] == "engine_dead" and done == "data: [DONE]"
    assert fresh.popen.wait(4) == 1
