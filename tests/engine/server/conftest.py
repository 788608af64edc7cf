"""A scriptable engine with the surface of AsyncLLM, and the real server round it on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvloop

from nybble.engine.config import EngineConfig, ModelConfig
from nybble.engine.expert_stats import check_counting
from nybble.engine.request import CompletionOutput, Logprob, RequestOutput, RequestOutputKind
from nybble.engine.server.api import Limits
from nybble.engine.server.app import build_app, web_server
from nybble.engine.server.args import ServerArgs
from nybble.engine.server.listen import bind, url
from nybble.engine.text.chat_template import ChatRenderer
from nybble.plugins.errors import EngineDeadError, RequestError

MAX_LEN, VOCAB = 64, 256


CONFIG = EngineConfig(
    model=ModelConfig(
        model="/fake",
        served_model_name="fake",
        tokenizer=None,
        hf_config={},
        architecture="Fake",
        dtype="float32",
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        is_demo=True,
    )
)
TEMPLATE = """\
{%- if refuse is defined %}{{ raise_exception('no such role') }}{% endif -%}
{%- for m in messages -%}
{{ m.role[0] }}:{{ m.content }}{% if not loop.last or m.role != 'assistant' %}|{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}a:{% endif %}"""


class FakeTokenizer:
    """One token a character; a chat is `r:content|` a message, r the role's first letter, then `a:`."""

    def __init__(self) -> None:
        self.render_chat = ChatRenderer({"default": TEMPLATE}, {}).render

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % VOCAB for c in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    special_ids: frozenset[int] = frozenset()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


@dataclass
class FakeEngine:
    """Answers `text`, one character a step, `delay` seconds apart.

    `at[k]` is raised, or called, before token k of every request; `finish` is how a complete answer ends.
    """

    text: str = "Hello!"
    delay: float = 0.0
    finish: str = "stop"
    at: dict[int, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    errored: bool = False
    is_running: bool = True
    num_unfinished: int = 0
    layout: Any = None
    layers: Any = ()
    attention: Any = None
    tokenizer: FakeTokenizer | None = field(default_factory=FakeTokenizer)
    seen: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    listeners: list[Any] = field(default_factory=list)
    config: EngineConfig = CONFIG
    counted: Any = None  # called for what expert_counts gives; None is an engine that does not count

    async def start(self) -> None:
        await asyncio.sleep(self.delay)

    async def shutdown(self, timeout: float) -> None:
        self.is_running = False

    def default_sampling_params(self) -> dict[str, Any]:
        return self.defaults

    def add_stats_listener(self, listener: Any) -> None:
        self.listeners.append(listener)

    async def expert_counts(self, reset=False):
        check_counting(self.counted is not None)
        return await self.counted(reset)

    async def generate(self, prompt, sampling_params, request_id, *, priority=0, cache_salt=None):
        self.seen.append(
            {
                "prompt": prompt,
                "params": sampling_params,
                "id": request_id,
                "priority": priority,
                "salt": cache_salt,
            }
        )
        params, ended, finished = sampling_params, 0, False
        if max(prompt) >= VOCAB:
            raise RequestError("token outside the vocabulary", param="prompt")
        scores = self._scores(prompt, params.prompt_logprobs)
        steps: list[CompletionOutput] = []
        try:
            async for step in self._steps(params):
                steps.append(step)
                ended += step.finish_reason is not None
                finished = ended == params.n
                if params.output_kind is RequestOutputKind.DELTA:
                    yield self._output(request_id, prompt, scores, [step], finished)
                    scores = None
            if params.output_kind is RequestOutputKind.FINAL_ONLY:
                whole = [self._joined([s for s in steps if s.index == i]) for i in range(params.n)]
                yield self._output(request_id, prompt, scores, whole, True)
        finally:
            if not finished:
                self.aborted.append(request_id)

    async def _steps(self, params):
        text = (self.text * 100)[: params.max_tokens] if params.ignore_eos else self.text[: params.max_tokens]
        for k, char in enumerate(text):
            if (fault := self.at.get(k)) is not None:
                if isinstance(fault, Exception):
                    raise fault
                await fault() if asyncio.iscoroutinefunction(fault) else fault()
            await asyncio.sleep(self.delay)
            last = k == len(text) - 1
            reason = ("length" if len(text) == params.max_tokens else self.finish) if last else None
            for i in range(params.n):
                logprobs = None if params.logprobs is None else [self._entry(ord(char), params.logprobs)]
                yield CompletionOutput(
                    index=i, text=char, token_ids=[ord(char)], logprobs=logprobs, finish_reason=reason
                )

    def _scores(self, prompt, top):
        return None if top is None else [None, *(self._entry(token, top) for token in prompt[1:])]

    def _entry(self, token, top):
        others = {
            (token + i) % VOCAB: Logprob(-1.0 - i, i + 1, chr((token + i) % VOCAB))
            for i in range(1, max(top, 1))
        }
        return {token: Logprob(-0.5 if top else float("-inf"), 1, chr(token)), **others}

    def _output(self, request_id, prompt, scores, outputs, finished):
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=prompt,
            prompt_logprobs=scores,
            outputs=outputs,
            finished=finished,
            num_cached_tokens=1,
        )

    def _joined(self, steps):
        logprobs = None if steps[0].logprobs is None else [e for s in steps for e in s.logprobs]
        return CompletionOutput(
            index=steps[0].index,
            text="".join(s.text for s in steps),
            logprobs=logprobs,
            token_ids=[t for s in steps for t in s.token_ids],
            finish_reason=steps[-1].finish_reason,
        )


@dataclass
class LiveServer:
    """A running server: where it is, what is behind it, and clients for it."""

    engine: FakeEngine
    url: str
    app: Any
    web: Any

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=20)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def openai(self, **kwargs: Any) -> Any:
        import openai  # a second of imports that the processes of test_lifecycle.py can do without

        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, **{"api_key": "none", **kwargs})

    @staticmethod
    def until(condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)


@contextlib.contextmanager
def running(engine: FakeEngine, args: ServerArgs, limits: Limits, host: Any) -> Iterator[LiveServer]:
    sock = bind(args)
    app = build_app(engine, args, limits=limits, host=host)
    web = web_server(app, limits)

    def target() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(web.serve(sockets=[sock]))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive(), "the server did not start"
    server = LiveServer(engine, "http://nybble" if args.uds else url(args, sock), app, web)
    try:
        yield server
    finally:
        server.http.close()
        web.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


def starter() -> Iterator[Callable[..., LiveServer]]:
    """start(engine fields, args=ServerArgs fields, limits=Limits fields) -> a running server."""
    with contextlib.ExitStack() as stack:

        def start(*, args: dict | None = None, limits: dict | None = None, host: Any = None, **engine: Any):
            full = ServerArgs(**{"port": 0, **(args or {})})
            return stack.enter_context(running(FakeEngine(**engine), full, Limits(**(limits or {})), host))

        yield start


serve = pytest.fixture(starter)
serve_module = pytest.fixture(scope="module")(starter)


@pytest.fixture(scope="module")
def server(serve_module) -> LiveServer:
    """One plain server for a whole file."""
    return serve_module()


@pytest.fixture
def dead() -> EngineDeadError:
    return EngineDeadError("worker was killed")
