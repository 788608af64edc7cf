"""From the bound socket to the exit code: loading, draining, dying, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from nybble.engine.server.args import ServerArgs
from nybble.engine.server.listen import bind, listening, url
from nybble.plugins.errors import PortInUseError, UsageError

PROGRAM = """
import asyncio, importlib.util, logging, sys, uvloop
logging.basicConfig(level="INFO")
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = sys.modules["fakes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)
from nybble.engine.server.app import run
from nybble.engine.server.args import ServerArgs
from nybble.engine.server.listen import bind
from nybble.plugins.errors import CheckpointError, EngineDeadError
kind, args = sys.argv[2], ServerArgs(port=0, shutdown_timeout=float(sys.argv[3]))
class Engine(fakes.FakeEngine):
    async def start(self):
        if kind == "broken": raise CheckpointError("no weights")
        await asyncio.sleep(60 if kind == "loading" else 0.1)
    def die(self):
        self.errored = True
        raise EngineDeadError("killed")
engine = Engine(text="abcdefgh", delay=0.1)
if kind == "dying": engine.at[3] = engine.die
sock = bind(args)
print(sock.getsockname()[1], flush=True)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    sys.exit(runner.run(run(engine, args, sock)))
"""


class Process:
    """A server in a process: `stream()` reads one completion's events in a thread."""

    def __init__(self, kind: str, shutdown_timeout: float) -> None:
        fakes = Path(__file__).with_name("conftest.py")
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, fakes, kind, str(shutdown_timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{int(self.popen.stdout.readline())}"
        self.http = httpx.Client(base_url=self.url, timeout=10)

    def ready(self) -> None:
        while self.health() != 200:
            time.sleep(0.02)

    def health(self) -> int:
        return self.http.get("/health").status_code

    def stream(self) -> tuple[threading.Thread, list]:
        events: list = []

        def read() -> None:
            body = {"prompt": "x", "stream": True, "max_tokens": 8}
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=10) as response:
                events.extend(line[6:] for line in response.iter_lines() if line)

        thread = threading.Thread(target=read)
        thread.start()
        while self.http.get("/load").json()["server_load"] == 0:
            time.sleep(0.01)
        return thread, events

    def signal(self, number: int) -> float:
        self.popen.send_signal(number)
        return time.monotonic()

    def exit_code(self, within: float) -> int:
        return self.popen.wait(within)


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def begin(kind: str = "plain", shutdown_timeout: float = 10.0) -> Process:
            process = Process(kind, shutdown_timeout)
            stack.callback(process.popen.communicate)
            stack.callback(process.popen.kill)
            return process

        yield begin


def text(events: list) -> str:
    return "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1] if "choices" in e)


def test_sigterm_lets_requests_finish_and_turns_others_away(start):
    process = start()
    process.ready()
    thread, events = process.stream()
    process.signal(signal.SIGTERM)
    time.sleep(0.2)
    completion = process.http.post("/v1/completions", json={"prompt": "x"})
    for response in (process.http.get("/health"), completion):
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "server_draining"
    assert process.exit_code(5) == 143
    thread.join()
    assert text(events) == "abcdefgh" and events[-1] == "[DONE]"
    banner = process.popen.stderr.read()
    assert "serves fake" in banner and "toy model" in banner and "not quantized; linear layers: " in banner
    assert "attention: not said" in banner  # by a fake engine
    assert f"curl {process.url}/v1/completions" in banner


@pytest.mark.parametrize("timeout, signals", [(0.1, 1), (30.0, 2)])
def test_what_does_not_finish_in_time_gets_an_error(start, timeout, signals):
    process = start(shutdown_timeout=timeout)
    process.ready()
    thread, events = process.stream()
    time.sleep(0.15)
    for _ in range(signals):
        sent = process.signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.exit_code(5) == 130 and time.monotonic() - sent < 2
    thread.join()
    assert json.loads(events[-2])["error"]["code"] == "server_stopped" and events[-1] == "[DONE]"
    assert 0 < len(text(events)) < 8


def test_while_loading_it_says_so_and_stops_at_once(start):
    process = start("loading")
    assert process.health() == 503
    answer = process.http.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_loading")
    assert process.http.get("/version").status_code == 200
    sent = process.signal(signal.SIGTERM)
    assert process.exit_code(5) == 143 and time.monotonic() - sent < 2


def test_a_dead_engine_answers_everyone_then_exits_1(start):
    process = start("dying")
    process.ready()
    began = time.monotonic()
    thread, events = process.stream()
    assert process.exit_code(5) == 1 and time.monotonic() - began < 3
    thread.join()
    assert json.loads(events[-2])["error"]["code"] == "engine_dead" and events[-1] == "[DONE]"


def test_an_engine_that_does_not_start_is_raised(start):
    process = start("broken")
    assert process.exit_code(5) == 1
    assert "CheckpointError: no weights" in process.popen.stderr.read()


def test_a_taken_port_names_its_owner():
    with bind(ServerArgs(port=0)) as sock:
        port = sock.getsockname()[1]
        assert url(ServerArgs(), sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(PortInUseError, match=rf"127.0.0.1:{port} is taken\n  found: pid {os.getpid()} "):
            bind(ServerArgs(port=port))
    bind(ServerArgs(port=port)).close()


def test_a_unix_socket_is_private_and_replaced_only_when_dead(tmp_path):
    args = ServerArgs(uds=str(tmp_path / "s"))
    with listening(args) as sock:
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600 and url(args, sock) == f"unix:{args.uds}"
        with pytest.raises(PortInUseError):
            bind(args)
    assert not (tmp_path / "s").exists()
    bind(args).close()
    with listening(args):
        (tmp_path / "s").unlink()
        (tmp_path / "s").write_text("another's")
    assert (tmp_path / "s").read_text() == "another's"
    for name in ("s", ".", "broken link"):
        if name == "broken link":
            (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(UsageError, match="is not a socket"):
            bind(ServerArgs(uds=str(tmp_path / name)))
    assert (tmp_path / "s").read_text() == "another's"


@pytest.mark.parametrize(
    "args", [{"host": "no such host"}, {"host": "203.0.113.7"}, {"uds": "/no/such/folder/s"}]
)
def test_an_address_that_cannot_be_had_is_a_usage_error(args):
    with pytest.raises(UsageError, match="cannot listen on"):
        bind(ServerArgs(**args))


def test_serving_on_a_unix_socket(serve, tmp_path):
    serve(args={"uds": str(tmp_path / "s")})
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(tmp_path / "s")), base_url="http://nybble"
    ) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "fake"
        assert http.post("/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"] == "Hello!"


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    args = ServerArgs(host="::1", port=0)
    try:
        sock = bind(args)
    except UsageError:
        pytest.skip("no IPv6 loopback here")
    with sock:
        assert url(args, sock).startswith("http://[::1]:")
