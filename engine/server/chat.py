"""POST /v1/chat/completions: messages through the model's chat template, the answer as a message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..request import CompletionOutput, TokenLogprobs
from ..text.chat_template import RESERVED
from .api import Api, json_response
from .body import read_json
from .errors import refused
from .generation import Job, Prompt, Tally, make_job, run, too_long
from .logprobs import chat_logprobs, finite
from .protocol import (
    UNSUPPORTED_IN_CHAT,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    FinishReason,
    TokenizeRequest,
    Usage,
)
from .sse import EventStream, event


async def create_chat_completion(api: Api, request: Request) -> Response | EventStream:
    asked, headers = await read_json(request, ChatRequest, api.limits, UNSUPPORTED_IN_CHAT)
    api.check_model(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    if (asked.top_logprobs or 0) > api.engine.config.model.max_logprobs > -1:
        raise refused(f"top_logprobs is at most {api.engine.config.model.max_logprobs}", "top_logprobs")
    prompt = Prompt(token_ids=await render(api, asked, asked.messages))
    sent_as = {"prompt": "messages", "logprobs": "top_logprobs"}
    max_tokens = asked.max_tokens
    if asked.max_completion_tokens is not None:
        max_tokens, sent_as["max_tokens"] = asked.max_completion_tokens, "max_completion_tokens"
    job = make_job(
        api,
        request,
        asked,
        [prompt],
        kind="chatcmpl",
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        prompt_logprobs=asked.prompt_logprobs,
        sent_as=sent_as,
    )
    writer = _Writer(api, asked, job)
    if asked.stream:
        return EventStream(api, writer.events(), headers)
    return json_response(await api.lifecycle.guard(request.receive, writer.whole()), headers)


async def render(api: Api, asked: ChatRequest | TokenizeRequest, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation. Raises ApiError and RequestError 400, naming the message or the setting.

    Always in a thread: a template is a program, and may be slow.
    """
    tokenizer = api.tokenizer()
    if reserved := sorted((RESERVED | {"self"}) & asked.chat_template_kwargs.keys()):
        raise refused(f"chat_template_kwargs cannot set {', '.join(reserved)}", "chat_template_kwargs")
    prompted = asked.add_generation_prompt

    def run() -> list[int]:
        text = tokenizer.render_chat(
            messages,
            add_generation_prompt=not asked.continue_final_message if prompted is None else prompted,
            continue_final_message=asked.continue_final_message,
            **asked.chat_template_kwargs,
        )
        if len(text) > api.max_characters:
            raise too_long(api, len(text), "messages")
        return tokenizer.encode(text, add_special_tokens=False)

    return await asyncio.to_thread(run)


class _Writer:
    """Engine outputs as one response, whole or in chunks."""

    def __init__(self, api: Api, asked: ChatRequest, job: Job) -> None:
        self.api, self.asked, self.job = api, asked, job
        self.tally = Tally(job)
        self.prompt_token_ids = job.prompts[0].token_ids if asked.return_token_ids else UNSET

    async def whole(self) -> ChatResponse:
        choices: list[ChatChoice] = []
        scores: list[TokenLogprobs | None] | None = None
        async with aclosing(run(self.api, self.job)) as outputs:
            async for index, output in outputs:
                self.tally.add(index, output.outputs, output.num_cached_tokens)
                choices += [self.choice(completion) for completion in output.outputs]
                scores = output.prompt_logprobs or scores
        choices.sort(key=lambda choice: choice.index)
        return ChatResponse(
            id=self.job.response_id,
            created=self.job.created,
            model=self.api.model_name,
            choices=choices,
            usage=self.tally.usage(),
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=UNSET if scores is None else finite(scores),
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        counted, running = self.asked.usage_options()
        begun: set[int] = set()
        async with aclosing(run(self.api, self.job)) as outputs:
            async for index, output in outputs:
                self.tally.add(index, output.outputs, output.num_cached_tokens)
                for completion in output.outputs:
                    if not (completion.text or completion.finish_reason or self.shows_tokens(completion)):
                        continue
                    usage = self.tally.usage() if running else None if counted else UNSET
                    choice = self.chunk_choice(completion, first=completion.index not in begun)
                    yield event(self.chunk([choice], usage, UNSET if begun else self.prompt_token_ids))
                    begun.add(completion.index)
        if counted:
            yield event(self.chunk([], self.tally.usage(), UNSET))

    def shows_tokens(self, completion: CompletionOutput) -> bool:
        """Whether tokens without text (half a character, or held back) are still worth a chunk."""
        return bool(completion.token_ids) and (self.asked.logprobs or self.asked.return_token_ids)

    def choice(self, completion: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=completion.index,
            message=ChatMessage(content=completion.text),
            logprobs=self.logprobs(completion),
            finish_reason=cast("FinishReason | None", completion.finish_reason),
            stop_reason=completion.stop_reason,
            token_ids=completion.token_ids if self.asked.return_token_ids else UNSET,
        )

    def chunk_choice(self, completion: CompletionOutput, *, first: bool) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=completion.index,
            delta=ChatDelta(role="assistant" if first else UNSET, content=completion.text),
            logprobs=self.logprobs(completion),
            finish_reason=cast("FinishReason | None", completion.finish_reason),
            stop_reason=completion.stop_reason,
            token_ids=completion.token_ids if self.asked.return_token_ids else UNSET,
        )

    def chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_token_ids: list[int] | UnsetType,
    ) -> ChatChunk:
        return ChatChunk(
            id=self.job.response_id,
            created=self.job.created,
            model=self.api.model_name,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_token_ids,
        )

    def logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if not self.asked.logprobs or not completion.token_ids:
            return None
        return chat_logprobs(
            completion.token_ids,
            completion.logprobs or [],
            self.api.engine.tokenizer,
            self.asked.top_logprobs or 0,
        )
