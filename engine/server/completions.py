"""POST /v1/completions: text in, text out; with `echo` and `logprobs`, also how likely the prompt was."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..request import CompletionOutput, RequestOutput, TokenLogprobs
from .api import Api, json_response
from .body import read_json
from .errors import refused
from .generation import Job, Prompt, Tally, encode, make_job, run
from .logprobs import TextOffsets, completion_logprobs, finite
from .protocol import (
    UNSUPPORTED_IN_COMPLETIONS,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    FinishReason,
    Usage,
)
from .sse import EventStream, event

DEFAULT_MAX_TOKENS = 16
MAX_CHARACTER_BYTES = 4
"""A character that the prompt's last tokens began is ended by the completion's first."""


async def create_completion(api: Api, request: Request) -> Response | EventStream:
    asked, headers = await read_json(request, CompletionRequest, api.limits, UNSUPPORTED_IN_COMPLETIONS)
    api.check_model(asked.model)
    if asked.best_of not in (None, asked.n or 1):
        raise refused("best_of is not supported: it must equal n", "best_of", "unsupported_parameter")
    prompts = await _prompts(api, asked)
    scores = (asked.prompt_logprobs, asked.logprobs if asked.echo else None)
    wanted = [count for count in scores if count is not None]
    # The engine generates at least one token; to score a prompt alone, that one is dropped.
    max_tokens = 1 if asked.echo and asked.max_tokens == 0 else asked.max_tokens
    job = make_job(
        api,
        request,
        asked,
        prompts,
        kind="cmpl",
        max_tokens=max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=asked.logprobs,
        prompt_logprobs=-1 if -1 in wanted else max(wanted, default=None),
        sent_as={},
    )
    writer = _Writer(api, asked, job)
    if asked.stream:
        return EventStream(api, writer.events(), headers)
    return json_response(await api.lifecycle.guard(request.receive, writer.whole()), headers)


async def _prompts(api: Api, asked: CompletionRequest) -> list[Prompt]:
    """The four forms of `prompt`: text, texts, ids, lists of ids (or of texts and lists of ids)."""
    given = asked.prompt
    if given is None:
        raise refused("prompt is required", "prompt")
    if isinstance(given, str):
        given = [given]
    ids = [item for item in given if isinstance(item, int)]
    if ids and len(ids) != len(given):
        raise refused("prompt mixes token ids with texts or lists", "prompt")
    items: list[str | list[int]] = [ids] if ids else [item for item in given if not isinstance(item, int)]
    texts = [item for item in items if isinstance(item, str)]
    encoded = iter(await encode(api, texts, add_special_tokens=asked.add_special_tokens) if texts else ())
    return [
        Prompt(token_ids=next(encoded), text=item) if isinstance(item, str) else Prompt(token_ids=item)
        for item in items
    ]


class _Writer:
    """Engine outputs as one response, whole or in events. Choice i of prompt p has index p * n + i."""

    def __init__(self, api: Api, asked: CompletionRequest, job: Job) -> None:
        self.api, self.asked, self.job = api, asked, job
        self.tally = Tally(job)
        self.offsets: dict[int, TextOffsets] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}

    async def whole(self) -> CompletionResponse:
        choices: list[CompletionChoice] = []
        async with aclosing(run(self.api, self.job)) as outputs:
            async for index, output in outputs:
                choices += self.choices(index, output)
        choices.sort(key=lambda choice: choice.index)
        return self.response(choices, self.tally.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        counted, running = self.asked.usage_options()
        async with aclosing(run(self.api, self.job)) as outputs:
            async for index, output in outputs:
                for choice in self.choices(index, output):
                    if choice.text or choice.finish_reason or choice.logprobs or choice.token_ids:
                        usage = self.tally.usage() if running else None if counted else UNSET
                        yield event(self.response([choice], usage))
        if counted:
            yield event(self.response([], self.tally.usage()))

    def response(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self.job.response_id,
            created=self.job.created,
            model=self.api.model_name,
            choices=choices,
            usage=usage,
        )

    def choices(self, index: int, output: RequestOutput) -> list[CompletionChoice]:
        completions = (
            [_scored_only(c) for c in output.outputs] if self.asked.max_tokens == 0 else output.outputs
        )
        self.tally.add(index, completions, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[index] = output.prompt_logprobs
        return [self.choice(index, completion) for completion in completions]

    def choice(self, index: int, completion: CompletionOutput) -> CompletionChoice:
        number = index * self.job.params[index].n + completion.index
        prompt, first = self.job.prompts[index], number not in self.offsets
        echo = self.echo(prompt) if first and self.asked.echo else ""
        if first:
            skip = self.job.params[index].skip_special_tokens
            self.offsets[number] = TextOffsets(self.api.engine.tokenizer, skip)
        choice = CompletionChoice(
            index=number,
            text=echo + completion.text,
            stop_reason=completion.stop_reason,
            finish_reason=cast("FinishReason | None", completion.finish_reason),
        )
        if self.asked.return_token_ids:
            choice.token_ids = completion.token_ids
            choice.prompt_token_ids = prompt.token_ids if first else UNSET
        if first and self.asked.prompt_logprobs is not None:
            choice.prompt_logprobs = finite(self.prompt_logprobs.get(index, ()))
        if self.asked.logprobs is not None:
            choice.logprobs = self.logprobs(index, completion, self.offsets[number], echo if first else None)
        return choice

    def logprobs(
        self, index: int, completion: CompletionOutput, offsets: TextOffsets, echo: str | None
    ) -> CompletionLogprobs | None:
        """None for a piece without tokens. `echo` is the text in front of the first piece; None in later ones."""
        token_ids, entries = completion.token_ids, list(completion.logprobs or ())
        begins: list[int] = []
        if echo is not None:
            prompt = self.job.prompts[index].token_ids
            if self.asked.echo:
                begins = offsets.prompt(prompt, echo)
                token_ids, entries = prompt + token_ids, [*self.prompt_logprobs.get(index, ()), *entries]
            else:
                offsets.prompt(prompt[-MAX_CHARACTER_BYTES:], "")
        begins += offsets.completion(completion.token_ids)
        if not token_ids:
            return None
        return completion_logprobs(token_ids, entries, self.api.engine.tokenizer, begins)

    def echo(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        tokenizer = self.api.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


def _scored_only(completion: CompletionOutput) -> CompletionOutput:
    """The completion without the token that had to be generated to score its prompt."""
    return msgspec.structs.replace(
        completion,
        text="",
        token_ids=[],
        logprobs=None,
        stop_reason=None,
        finish_reason=completion.finish_reason and "length",
    )
