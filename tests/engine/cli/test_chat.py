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

from nybble.engine.cli.client import Client, read_events
from nybble.plugins.errors import EngineDeadError, NybbleError, RequestError, UsageError

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
    assert prompts(llm) == ["uhello"] and llm.llm_engine.requests["chat-0"][1].max_tokens == 512


@pytest.mark.parametrize(
    ("step", "fault", "code", "out", "asked"),
    [
        (0, RequestError("too long", fix="set truncate_prompt_tokens"), 2, "abc\n", ["uone", "utwo"]),
        (2, NybbleError("it broke"), 70, "ab\nabc\n", ["uone", "utwo"]),
        (2, EngineDeadError("it died"), 70, "ab\n", ["uone"]),
    ],
)
def test_a_refused_message_is_told_and_dropped(
    nybble: Run,
    llm: Any,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    fault: NybbleError,
    code: int,
    out: str,
    asked: list[str],
) -> None:
    llm.llm_engine.fault_at, llm.llm_engine.fault = step, fault
    type_in(monkeypatch, "one", "two")
    got = nybble("chat", "folder")
    assert got[:2] == (code, out) and prompts(llm) == asked
    assert fault.asked in got[2] and "truncate_prompt_tokens" not in got[2]


def test_a_person_has_seen_the_refusal(nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.llm_engine.fault_at, llm.llm_engine.fault = 0, RequestError("too long")
    type_in(monkeypatch, "one")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    code, _, err = nybble("chat", "folder")
    assert code == 0 and "error: too long\n  this message is dropped; /reset" in err


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
    """Answers "pong" in three events, refuses the key "bad" and fails for "worse"; `server.models` is its list."""

    def do_GET(self) -> None:
        self._answer(self.server.models)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        status = {"Bearer bad": 401, "Bearer worse": 503}.get(self.headers["Authorization"] or "")
        if status:
            self._answer(b'{"error": {"message": "no such key"}}', status)
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
        server.bodies, server.models = [], b'{"data": [{"id": "m"}]}'  # type: ignore[attr-defined]
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
            "top_p": 1.0,
        }
    ]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("--api-key", "bad"), 2, "401: no such key"),
        (("--api-key", "worse"), 70, "503: no such key"),
        (("--api-key", "a\nb"), 2, "API key must be printable ASCII"),
        (("--api-key", "h\u00e9"), 2, "API key must be printable ASCII"),
        (("--api-key", ""), 2, "API key must be printable ASCII"),
        (("--dtype", "auto"), 2, "--dtype is a setting of the server"),
        (("--config", "x"), 2, "--config is a setting of the server"),
        (("--seed", "x"), 2, "--seed must be a whole number"),
        (("--url", "ftp://x"), 2, "--url must be like http://"),
        (("--url", "http://"), 2, "--url must be like http://"),
        (("--url", "http://[::1"), 2, "--url must be like http://"),
        (("--url", "http://a:port"), 2, "--url must be like http://"),
        (("--url", "http://a b"), 2, "--url cannot be asked"),
        (("--url", "http://127.0.0.1:1"), 70, "cannot reach http://127.0.0.1:1"),
    ],
)
def test_refusals(nybble: Run, server: Any, argv: tuple[str, ...], code: int, words: str) -> None:
    got = nybble("chat", "--url", server.url, "-q", "ping", *argv)
    assert got[0] == code and words in got[2] and "internal error" not in got[2]


@pytest.mark.parametrize("models", [b"<html>", b'{"data": []}', b"{}", b"[]", b"\xff", b"[" * 99999, b'{"data": [[]]}'])
def test_a_server_of_another_kind(nybble: Run, server: Any, models: bytes) -> None:
    server.models = models
    code, _, err = nybble("chat", "--url", server.url, "-q", "ping")
    assert code == 70 and err.startswith(f"error: {server.url} does not answer like an OpenAI server")


@pytest.mark.parametrize("line", [b"data: <html>\n", b"data: []\n", b'data: {"choices": [{}]}\n', b"data: \xff\n"])
def test_events_of_another_kind(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    client = Client("http://127.0.0.1:8000/v1/", "key")
    monkeypatch.setattr(client, "_call", lambda *args: io.BytesIO(line))
    with pytest.raises(NybbleError, match="does not answer like an OpenAI server") as error:
        list(client.chat({}))
    assert not isinstance(error.value, UsageError)


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
