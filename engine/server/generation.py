"""What both completion endpoints share: prompts, sampling parameters, engine outputs as one stream, usage."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from ...plugins.errors import RequestError
from ...plugins.log import get_logger
from ..request import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from .api import Api
from .errors import ApiError, refused, to_api_error
from .metrics import RequestClock
from .middleware import sane_id
from .protocol import MAX_PROMPTS, GenerationRequest, PromptTokensDetails, Usage

logger = get_logger(__name__)
INLINE_CHARACTERS = 4096
"""Longer texts are tokenized in a thread: meanwhile the loop serves the others."""
MAX_COMPLETIONS = 4096

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids, and the text they came from where there was one."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request as the engine sees it: `params[i]` is how `prompts[i]` is completed.

    `sent_as` has the client's name of each field that the engine knows under another.
    """

    response_id: str
    created: int
    prompts: list[Prompt]
    params: list[SamplingParams]
    priority: int
    cache_salt: str | None
    sent_as: Mapping[str, str]


@contextmanager
def naming(sent_as: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of ours become errors about the field that the client sent."""
    try:
        yield
    except (ApiError, RequestError) as exc:
        error = to_api_error(exc)
        sent = None if error.param is None else sent_as.get(error.param)
        if sent is None:
            raise
        raise ApiError(error.status, f"{sent}: {error.message}", param=sent, code=error.code) from None


async def encode(api: Api, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text. Raises ApiError 400, without tokenizing, for one so long that it cannot fit."""
    tokenizer = api.tokenizer()
    longest = max(map(len, texts))
    if longest > api.max_characters:
        raise too_long(api, longest, "prompt")

    def run() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return run() if sum(map(len, texts)) <= INLINE_CHARACTERS else await asyncio.to_thread(run)


def too_long(api: Api, characters: int, param: str) -> ApiError:
    return refused(
        f"{param} has {characters} characters; at most {api.max_characters} are read for a context of "
        f"{api.engine.config.model.max_model_len} tokens",
        param,
        "context_length_exceeded",
    )


def make_job(
    api: Api,
    request: Request,
    asked: GenerationRequest,
    prompts: list[Prompt],
    *,
    kind: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    sent_as: Mapping[str, str],
) -> Job:
    """Check a request against the model's context and turn it into a Job.

    `max_tokens` is what the client gave; without it, the smaller of `default_max_tokens` and what is left.
    Raises ApiError and RequestError naming the field.
    """
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream: true", "stream_options")
    if asked.stream and asked.prompt_logprobs is not None:
        raise refused("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise refused(f"a request has 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", "prompt")
    if len(prompts) * (asked.n or 1) > MAX_COMPLETIONS:
        raise refused(f"prompts times n is at most {MAX_COMPLETIONS}", "n")
    values = {**api.engine.default_sampling_params(), **asked.sampling_fields()}
    default = min((m for m in (default_max_tokens, values.get("max_tokens")) if m is not None), default=None)
    values.update(logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    values["output_kind"] = RequestOutputKind.DELTA if asked.stream else RequestOutputKind.FINAL_ONLY
    context = api.engine.config.model.max_model_len
    prompts = [_truncate(prompt, asked.truncate_prompt_tokens, context) for prompt in prompts]
    with naming(sent_as):
        fitting = [fit_max_tokens(len(prompt.token_ids), max_tokens, default, context) for prompt in prompts]
        # A thousand prompts have few lengths: the parameters are checked once for each.
        params = {count: SamplingParams(**{**values, "max_tokens": count}) for count in set(fitting)}
    if asked.request_id is not None:
        request.state.request_id = sane_id(asked.request_id)
    return Job(
        response_id=f"{kind}-{request.state.request_id}",
        created=int(time.time()),
        prompts=prompts,
        params=[params[count] for count in fitting],
        priority=asked.priority,
        cache_salt=api.keys.cache_salt(request.state.key_id, asked.cache_salt),
        sent_as=sent_as,
    )


def fit_max_tokens(prompt_tokens: int, asked: int | None, default: int | None, context: int) -> int:
    """How many tokens may be generated. Raises ApiError 400 when prompt and answer do not fit the context."""
    room = context - prompt_tokens
    if prompt_tokens == 0:
        raise refused("the prompt has no tokens", "prompt")
    if room < 1 or (asked is not None and asked > room):
        wanted = f" and max_tokens is {asked}" if asked is not None else ""
        raise refused(
            f"the prompt has {prompt_tokens} tokens{wanted}; the model's context is {context} tokens",
            "prompt" if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    return asked if asked is not None else min(room, default or room)


def _truncate(prompt: Prompt, keep: int | None, context: int) -> Prompt:
    """The last `keep` tokens (-1: as many as leave room for one more), as vLLM's truncate_prompt_tokens."""
    if keep is None:
        return prompt
    keep = context - 1 if keep == -1 else keep
    if len(prompt.token_ids) <= keep:
        return prompt
    return Prompt(token_ids=prompt.token_ids[len(prompt.token_ids) - keep :])


async def run(api: Api, job: Job) -> Outputs:
    """(prompt index, output) as the engine produces them. Closing it aborts what is not finished.

    Raises RequestError before the first output for a bad request; EngineDeadError and ApiError at any time.
    """
    streams = [_one(api, job, i) for i in range(len(job.prompts))]
    async with aclosing(_alone(streams[0]) if len(streams) == 1 else _merged(streams)) as outputs:
        async for item in outputs:
            yield item


async def _one(api: Api, job: Job, index: int) -> AsyncGenerator[RequestOutput, None]:
    prompt, params = job.prompts[index].token_ids, job.params[index]
    # Two clients may send the same X-Request-Id; the engine needs ids of its own.
    request_id = f"{job.response_id}-{index}-{secrets.token_hex(4)}"
    if api.args.enable_log_requests:
        # no field that could hold a user's words: stop strings, bad words, the prompt
        logger.info(
            "request %s: %d prompt tokens, n=%d max_tokens=%s temperature=%g top_p=%g top_k=%d seed=%s",
            *(request_id, len(prompt), params.n, params.max_tokens),
            *(params.temperature, params.top_p, params.top_k, params.seed),
        )
    stream = api.engine.generate(prompt, params, request_id, priority=job.priority, cache_salt=job.cache_salt)
    api.heartbeat.expect()
    with RequestClock(api.metrics, params.n) as clock, naming(job.sent_as):
        async with aclosing(stream):
            async for output in stream:
                clock.observe(output)
                for completion in output.outputs:
                    if completion.finish_reason == "error":
                        raise ApiError(
                            500,
                            completion.error or "the model's output was not a number",
                            code="numerical_error",
                        )
                    if completion.finish_reason == "abort":
                        raise ApiError(503, "the request was aborted", code="request_aborted")
                yield output


async def _alone(stream: AsyncGenerator[RequestOutput, None]) -> Outputs:
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


async def _merged(streams: list[AsyncGenerator[RequestOutput, None]]) -> Outputs:
    """Whatever comes next from any stream; holds one output, so that a slow reader makes the engine merge."""
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream):
                async for output in stream:
                    await queue.put((index, output))
        except Exception as exc:
            end = exc
        await queue.put((index, end))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        remaining = len(tasks)
        while remaining:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                remaining -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Tally:
    """Counts tokens of a job for `usage`; prompts are counted once, whatever n."""

    def __init__(self, job: Job) -> None:
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self.completion_tokens = 0
        self._cached = [0] * len(job.prompts)

    def add(self, index: int, completions: list[CompletionOutput], cached_tokens: int) -> None:
        self.completion_tokens += sum(len(completion.token_ids) for completion in completions)
        self._cached[index] = max(self._cached[index], cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)),
        )
