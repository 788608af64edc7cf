"""The OpenAI API as structs: what requests may hold, what responses look like; vLLM's names for extras.

A field left out of a request (or null) is None here unless absence has a meaning of its own; the ranges of
sampling values are SamplingParams' business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ..request import Logprob, SamplingParams

MAX_PROMPTS = 1024
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Int32 = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
ShortText = Annotated[str, Meta(max_length=256)]
FinishReason = Literal["stop", "length"]

_STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("suffix", "prompt_embeds", *_STRUCTURED), ()),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
}
UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("chat_template", "function_call", "audio", "prediction", *_STRUCTURED), ()),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "documents": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
}


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both kinds of completion share."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Int32 | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int32 = 0
    cache_salt: ShortText | None = None
    request_id: ShortText | None = None
    return_token_ids: bool = False

    def sampling_fields(self) -> dict[str, Any]:
        """The sampling settings that the client gave, by SamplingParams' names."""
        values = {name: getattr(self, name) for name in SHARED_SAMPLING_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def usage_options(self) -> tuple[bool, bool]:
        """Whether a stream ends with a usage chunk, and whether every chunk also carries the usage so far."""
        options = self.stream_options or StreamOptions()
        return options.include_usage, options.include_usage and options.continuous_usage_stats


SHARED_SAMPLING_FIELDS = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name != "truncate_prompt_tokens"
)


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest, kw_only=True):
    messages: list[dict[str, Any]] = []
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    max_completion_tokens: Int32 | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`prompt` as text, or `messages` as the chat endpoint would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class TokenizeResponse(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "nybble"
    demo: bool | UnsetType = UNSET
    description: str | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


PromptLogprobs = list[dict[int, Logprob] | None]


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Four parallel lists, one entry per token; the first token of a text has no log probability."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    """A whole completion, or a piece of a streamed one (same `object`)."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    """`role` comes once per choice, together with its first text."""

    role: str | UnsetType = UNSET
    content: str


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
