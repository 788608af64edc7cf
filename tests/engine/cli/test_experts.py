"""`nybble experts`: prompts run here, a server asked, table, JSON and heat map, and what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nybble as package
from nybble.engine.expert_stats import ExpertCounts, as_html, as_json, as_table
from nybble.plugins.errors import UsageError

Run = Callable[..., tuple[int, str, str]]
LAYERS = [ExpertCounts(layer=f"layers.{i}", counts=[6, 0, i]) for i in range(2)]


class Handler(BaseHTTPRequestHandler):
    """A server with the key `k` that notes what it is asked."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.command, self.path))  # type: ignore[attr-defined]
        known = self.headers["authorization"] == "Bearer k"
        body = as_json(LAYERS) if "experts" in self.path else b'{"data": [{"id": "mix"}]}'
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(body if known else b'{"error": {"message": "wrong key"}}')

    do_GET = do_POST = answer

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def remote() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def counting(llm: Any) -> Any:
    """The fake LLM, with counts."""
    llm.expert_counts = lambda: LAYERS
    llm.llm_engine.config = SimpleNamespace(model=SimpleNamespace(served_model_name="mix"))
    return llm


def test_prompts_run_here(nybble: Run, counting: Any, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    code, out, err = nybble("experts", "folder", "-p", "A", "-p", "B", "--max-tokens", "3", "--html", str(page))
    assert (code, out, err) == (0, as_table(LAYERS) + "\n", "")
    assert page.read_text(encoding="utf-8") == as_html(LAYERS, "mix")
    assert counting.args.expert_stats and counting.args.model == "folder" and counting.down
    assert [(prompt, params.max_tokens) for prompt, params in counting.llm_engine.requests.values()] == [
        ("A", 3), ("B", 3)]


def test_prompts_of_stdin_are_lines(nybble: Run, counting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    code, out, _ = nybble("experts", "folder", "--json")
    assert code == 0 and json.loads(out) == json.loads(as_json(LAYERS))
    assert [prompt for prompt, _ in counting.llm_engine.requests.values()] == ["one", "two"]


@pytest.mark.parametrize(("flags", "asked"), [((), ("GET", "/nybble/experts")),
                                              (("--reset",), ("POST", "/nybble/experts/reset"))])
def test_a_server_is_asked(nybble: Run, remote: Any, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...],
                           asked: tuple[str, str]) -> None:
    monkeypatch.setenv("NYBBLE_API_KEY", "k")
    assert nybble("experts", "--url", remote.url, *flags) == (0, as_table(LAYERS) + "\n", "")
    assert remote.seen == [("GET", "/v1/models"), asked]
    code, _, err = nybble("experts", "--url", remote.url, "--api-key", "other")
    assert code == 2 and "401: wrong key" in err


@pytest.mark.parametrize(("argv", "words"), [
    (("--url", "http://h", "-p", "A"), "--prompt is for a model that runs here"),
    (("--url", "http://h", "--max-model-len", "8"), "--max-model-len is for a model that runs here"),
    (("--url", "http://h", "--max-tokens", "8"), "--max-tokens is for a model that runs here"),
    (("--url", "http://h", "folder"), "MODEL is for a model that runs here"),
    (("--url", "nowhere"), "--url must be like"),
    (("folder", "-p", "A", "--reset"), "--reset is for a server"),
    (("folder", "-p", "A", "--api-key", "k"), "--api-key is for a server"),
    (("folder",), "stdin holds no prompt"),
    (("folder", "-p", "A", "--html", "/no/such/folder/map.html"), "--html cannot be written"),
])
def test_refusals(nybble: Run, counting: Any, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...],
                  words: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, _, err = nybble("experts", *argv)
    assert code == 2 and words in err


def test_a_model_without_experts_runs_nothing(nybble: Run, counting: Any) -> None:
    def refuse() -> None:
        raise UsageError("this model has no experts")

    counting.expert_counts = refuse
    code, _, err = nybble("experts", "folder", "-p", "A")
    assert code == 2 and "no experts" in err and counting.down and not counting.llm_engine.requests


def test_help_and_a_server_need_no_torch(remote: Any) -> None:
    program = f"""
import sys
from nybble.engine.cli import main
assert main(["experts", "--help"]) == 0
assert main(["experts", "--url", {remote.url!r}, "--api-key", "k"]) == 0
assert not {{"torch", "starlette", "numpy"}} & set(sys.modules)
"""
    source = os.path.dirname(os.path.dirname(package.__file__))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": source})
    assert done.returncode == 0, done.stderr
    assert "--html" in done.stdout and as_table(LAYERS) in done.stdout


def test_a_real_model(make_checkpoint: Any, nybble: Run) -> None:
    folder = make_checkpoint("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    code, out, err = nybble("experts", str(folder), "--device", "cpu", "--dtype", "float32", "--no-use-tqdm-on-load",
                            "--num-gpu-blocks-override", "16", "-p", "Hello", "--max-tokens", "1", "--json")
    assert code == 0, err
    found = json.loads(out)["layers"]
    assert len(found) == 2 and {layer["total"] for layer in found} == {2 * len("Hello")}, "one token a byte, no more"
