"""`nybble generate`: streaming, several prompts, JSON, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nybble.engine.request import RequestOutputKind

Run = Callable[..., tuple[int, str, str]]


def test_one_prompt_streams(nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert nybble("generate", "folder", "-p", "Hi", "--top-k", "5", "--stop", "x", "--seed", "4")[:2] == (
        0,
        "abc\n",
    )
    prompt, params = llm.llm_engine.requests["0"]
    assert (prompt, params.top_k, params.stop, params.max_tokens) == ("Hi", 5, ["x"], 128)
    assert params.top_p == 0.5, "what no flag says is the checkpoint's"
    assert (params.output_kind, llm.args.seed, llm.args.model) == (RequestOutputKind.DELTA, 4, "folder")
    assert llm.down and not llm.llm_engine.aborted


def test_a_prompt_from_stdin(nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert nybble("generate", "folder")[0] == 0
    assert llm.llm_engine.requests["0"][0] == "two\nlines"


def test_several_completions_have_headings(nybble: Run, llm: Any) -> None:
    _, out, _ = nybble("generate", "folder", "-p", "A", "-p", "B", "--n", "2")
    assert out.splitlines() == [
        line for i in (1, 2) for j in (1, 2) for line in (f"--- prompt {i}, completion {j}", "abc")
    ]


def test_json_is_one_object_a_prompt(nybble: Run, llm: Any) -> None:
    _, out, _ = nybble("generate", "folder", "-p", "A", "-p", "B", "--json", "--logprobs", "2")
    first, second = map(json.loads, out.splitlines())
    assert (first["prompt"], second["prompt"], first["outputs"][0]["text"]) == ("A", "B", "abc")
    assert llm.llm_engine.requests["0"][1].logprobs == 2


@pytest.mark.parametrize(
    ("argv", "out"),
    [(("-p", "A"), "a\n"), (("-p", "A", "-p", "B"), "--- prompt 1, completion 1\na\n--- prompt 2")],
)
def test_ctrl_c_prints_what_there_is_and_aborts(
    nybble: Run, llm: Any, argv: tuple[str, ...], out: str
) -> None:
    llm.llm_engine.fault_at, llm.llm_engine.fault = 1, KeyboardInterrupt()
    code, got, err = nybble("generate", "folder", *argv)
    assert code == 130 and got.startswith(out) and not err
    assert llm.llm_engine.aborted == [str(i) for i in range(len(argv) // 2)] and llm.down


def test_a_request_that_fails_in_the_engine(nybble: Run, llm: Any) -> None:
    llm.llm_engine.error = "logits are not finite"
    code, _, err = nybble("generate", "folder", "-p", "A")
    assert code == 70 and "the request failed" in err and "logits are not finite" in err and llm.down


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-p", "A", "--logprobs", "1"), "--logprobs is printed in JSON only"),
        (("-p", "A", "--temperature", "-1"), "temperature must be a number in"),
        (("-p", "A", "--top-k", "many"), "--top-k: invalid int value"),
        (("-p", "A", "--temprature", "1"), "did you mean --temperature?"),
        ((), "stdin holds no prompt"),
    ],
)
def test_refusals(
    nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = nybble("generate", "folder", *argv)
    assert code == 2 and words in err and not llm.llm_engine.requests


def test_a_terminal_is_not_waited_on(nybble: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, _, err = nybble("generate", "folder")
    assert code == 2 and "there is no prompt" in err


def test_the_demo_says_that_it_is_a_toy(nybble: Run, llm: Any) -> None:
    code, out, err = nybble("generate", "-p", "Hi")
    assert (code, out) == (0, "abc\n") and err.count("\n") == 1 and "toy model" in err
