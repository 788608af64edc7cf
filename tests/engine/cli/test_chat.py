"""`nybble chat`: the conversation, in this process and with a server."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nybble.engine.cli.client import read_events
from nybble.plugins.errors import NybbleError

Run = Callable[..., tuple[int, str, str]]


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def prompts(llm: Any) -> list[str]:
    return ["".join(map(chr, prompt)) for prompt, _ in llm.llm_engine.requests.values()]


def test_history_goes_through_the_template(nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "one", "", "two", "/reset", "three", "/bye", "/exit", "never")
    code, out, err = nybble("chat", "folder", "--system", "S", "--max-tokens", "7")
    assert (code, out) == (0, "abc\n" * 3)
    assert prompts(llm) == ["sSuone", "sSuoneaabcutwo", "sSuthree"]
    assert "no command '/bye'; known: /exit, /reset" in err
    assert llm.llm_engine.requests["chat-0"][1].max_tokens == 7 and llm.down


def test_one_question(nybble: Run, llm: Any) -> None:
    assert nybble("chat", "folder", "-q", "hello")[:2] == (0, "abc\n")
    assert prompts(llm) == ["uhello"]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.llm_engine.fault_at, llm.llm_engine.fault = 2, KeyboardInterrupt()
    type_in(monkeypatch, "one")
    assert nybble("chat", "folder")[:2] == (0, "ab\n")
    assert llm.llm_engine.aborted == ["chat-0"]
    llm.llm_engine.steps = 0
    assert nybble("chat", "folder", "-q", "one")[:2] == (130, "ab")


class Handler(BaseHTTPRequestHandler):
    """Answers "pong" in three events, or refuses the key "bad"."""

    def do_GET(self) -> None:
        self._answer(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        if self.headers["Authorization"] == "Bearer bad":
            self._answer(b'{"error": {"message": "no such key"}}', 401)
            return
        deltas = [{"role": "assistant"}, {"content": "po"}, {"content": "ng"}]
        events = [{"choices": [{"delta": d}]} for d in deltas] + [{"choices": [], "usage": {}}]
        lines = [f"data: {json.dumps(e)}\n\n" for e in events] + [": ping\n\n", "data: [DONE]\n\n"]
        self._answer("".join(lines).encode())

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("suffix", "argv", "model"), [("", (), "m"), ("/v1/", ("other",), "other")])
def test_a_server_is_asked(nybble: Run, server: Any, suffix: str, argv: tuple[str, ...], model: str) -> None:
    code, out, err = nybble(
        "chat", *argv, "--url", server.url + suffix, "-q", "ping", "--seed", "1k", "--top-p", "1"
    )
    assert (code, out, err) == (0, "pong\n", "")
    assert server.bodies == [
        {
            "model": model,
            "messages": [{"role": "user", "content": "ping"}],
            "stream": True,
            "seed": 1000,
            "max_tokens": 512,
            "top_p": 1.0,
        }
    ]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("--api-key", "bad"), 70, "401: no such key"),
        (("--dtype", "auto"), 2, "--dtype is a setting of the server"),
        (("--config", "x"), 2, "--config is a setting of the server"),
        (("--seed", "x"), 2, "--seed must be a whole number"),
        (("--url", "ftp://x"), 2, "--url must begin with http:// or https://"),
        (("--url", "http://127.0.0.1:1"), 2, "cannot reach http://127.0.0.1:1"),
    ],
)
def test_refusals(nybble: Run, server: Any, argv: tuple[str, ...], code: int, words: str) -> None:
    got = nybble("chat", "--url", server.url, "-q", "ping", *argv)
    assert got[0] == code and words in got[2]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([b'data: {"choices": [{"delta": {"content": "a"}}]}\n'], "cut off"),
        ([b'data: {"error": {"message": "engine is dead"}}\n'], "engine is dead"),
    ],
)
def test_a_stream_that_breaks_is_an_error(lines: list[bytes], words: str) -> None:
    with pytest.raises(NybbleError, match=words):
        list(read_events(lines))
