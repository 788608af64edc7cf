"""The command line without an engine: a fake LLM that spells a text, and a clean environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.engine.cli import main
from nybble.engine.request import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams


class FakeEngine:
    """Gives every request the letters of `text`, one a step; step `fault_at` raises `fault` instead."""

    def __init__(self, text: str = "", fault_at: int = -1, fault: BaseException | None = None) -> None:
        self.text, self.fault_at, self.fault = text, fault_at, fault
        self.requests: dict[str, tuple[Any, SamplingParams]] = {}
        self.running: dict[str, int] = {}
        self.aborted: list[str] = []
        self.error: str | None = None
        self.steps = 0

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        self.requests[request_id] = (prompt, params)
        self.running[request_id] = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def abort_request(self, request_ids: list[str]) -> list[RequestOutput]:
        self.aborted += request_ids
        for request_id in request_ids:
            self.running.pop(request_id, None)
        return []

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.steps - 1 == self.fault_at:
            raise self.fault
        return [output for request_id in list(self.running) for output in self._advance(request_id)]

    def _advance(self, request_id: str) -> Iterator[RequestOutput]:
        """One output per completion, as the real engine has it."""
        prompt, params = self.requests[request_id]
        self.running[request_id] = at = self.running[request_id] + 1
        done = at >= len(self.text) or self.error is not None
        if done:
            del self.running[request_id]
        start = at - 1 if params.output_kind == RequestOutputKind.DELTA else 0
        reason = ("error" if self.error else "stop") if done else None
        for i in range(params.n):
            completion = CompletionOutput(
                index=i, text=self.text[start:at], token_ids=[at], finish_reason=reason, error=self.error
            )
            yield RequestOutput(
                request_id=request_id,
                prompt=str(prompt),
                prompt_token_ids=[],
                prompt_logprobs=None,
                finished=done and i == params.n - 1,
                outputs=[completion],
            )


class FakeLLM:
    """The part of LLM that the commands use; its template is the roles' initials and the contents."""

    def __init__(self) -> None:
        self.llm_engine = FakeEngine("abc")
        self.args: Any = None
        self.down = False

    def from_engine_args(self, args: Any) -> FakeLLM:
        self.args = args
        return self

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(top_p=0.5)

    def get_tokenizer(self) -> Any:
        def apply_chat_template(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
            assert add_generation_prompt
            return [ord(c) for m in messages for c in m["role"][0] + m["content"]]

        return SimpleNamespace(apply_chat_template=apply_chat_template)

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("NYBBLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """What the commands get for LLM."""
    fake = FakeLLM()
    monkeypatch.setitem(sys.modules, "nybble.engine.llm", SimpleNamespace(LLM=fake))  # type: ignore[misc]
    return fake


@pytest.fixture
def nybble(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """nybble("serve", "--help") -> (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run
