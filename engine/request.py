"""What a user asks for and gets back: SamplingParams, RequestOutput, and the messages between front end and core."""

from __future__ import annotations

import enum
import math
from collections.abc import Sized
from typing import Any, Literal

import msgspec

from ..plugins.errors import RequestError

MAX_N = 128
MAX_REQUEST_BYTES = 64 * 2**20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
# Bounds on what one request may make every step carry; vLLM has none and pays with its event loop.
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
GREEDY_EPSILON = 1e-5


class RequestOutputKind(enum.IntEnum):
    """How outputs are reported: everything so far, only what is new, or once at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request is sampled; names and defaults are vLLM's.

    Attributes:
        n: number of completions of the prompt.
        presence_penalty, frequency_penalty: in [-2, 2], over generated tokens.
        repetition_penalty: > 0, over prompt and generated tokens; 1 is off.
        temperature: >= 0; below 1e-5 means greedy.
        top_p: in (0, 1]. top_k: 0 or -1 is off. min_p: in [0, 1], relative to the likeliest token.
        seed: makes the request's tokens independent of what runs beside it.
        stop: strings that end the text, left out of it unless `include_stop_str_in_output`.
        stop_token_ids: ids that end the text like an end-of-sequence id.
        ignore_eos: go on past end-of-sequence ids.
        max_tokens: None means up to the model's context. min_tokens: no stop before that many.
        logprobs: top entries per generated token (-1: whole vocabulary); the sampled token is always among them.
        prompt_logprobs: the same for prompt tokens.
        detokenize: False leaves `text` empty.
        logit_bias: token id -> bias in [-100, 100] added to its logit.
        allowed_token_ids: only these can be sampled. bad_words: texts that must not appear.
        extra_args: for plugins; never read by nybble.
        skip_reading_prefix_cache: None lets `prompt_logprobs` decide.

    Raises:
        RequestError: a value out of range, naming the field in `param`.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_float("temperature", self.temperature, 0.0, 1e4)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_int("logprobs", self.logprobs, -1, 2**31 - 1)
        _check_int("prompt_logprobs", self.prompt_logprobs, -1, 2**31 - 1)
        _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens must not exceed max_tokens", param="min_tokens",
                               found=f"min_tokens {self.min_tokens}, max_tokens {self.max_tokens}")
        if self.n > 1 and self.is_greedy:
            raise RequestError("n must be 1 with temperature 0: greedy completions would all be equal", param="n",
                               found=self.n)
        _check_len("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_len("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_len("logit_bias", self.logit_bias, MAX_LOGIT_BIASES)
        self._check_stops()
        for token, bias in (self.logit_bias or {}).items():
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must name at least one token", param="allowed_token_ids", found="[]")
        for word in self.bad_words or ():
            if not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_CHARS:
                raise RequestError(f"a bad word has 1 to {MAX_BAD_WORD_CHARS} characters", param="bad_words",
                                   found=repr(word)[:80])

    def _check_stops(self) -> None:
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings", param="stop", found=len(stops))
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
                raise RequestError(f"a stop string has 1 to {MAX_STOP_CHARS} characters", param="stop",
                                   found=repr(stop)[:80])
        if stops and not self.detokenize:
            raise RequestError("stop strings need detokenize=True", param="stop", found="detokenize=False")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked like a new one."""
        return msgspec.structs.replace(self, **changes)


def _check_len(name: str, values: Sized | None, most: int) -> None:
    if values is not None and len(values) > most:
        raise RequestError(f"{name} has at most {most} entries", param=name, found=len(values))


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer in [{low}, {high}]", param=name, found=repr(value))


def _check_float(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        raise RequestError(f"{name} must be a number in {'(' if open_low else '['}{low}, {high}]", param=name,
                           found=repr(value))


class Logprob(msgspec.Struct, frozen=True):
    """Log probability of a token, its rank in the vocabulary (1 is likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


class RequestMetrics(msgspec.Struct, kw_only=True):
    """Times of one request in seconds of a monotonic clock, and how it was scheduled."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One completion of a prompt.

    `logprobs` has one {token id: Logprob} per token of `token_ids` when asked for. `finish_reason` is "stop",
    "length", "abort" or "error"; `stop_reason` is the stop string or stop token id that matched. `error` says what
    ended it; `error_code` is set when the engine refused the request rather than failed on it ("engine_overloaded").
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, kw_only=True):
    """What a request has produced; `outputs` are ordered by `index`.

    `delta`: text, token ids and log probabilities are only what came since the request's last output.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    delta: bool = False


class EngineCoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Front end -> core: a validated request. Token ids are all inside the model's vocabulary."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: list[int] = []
    eos_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0


class TokenLogprobLists(msgspec.Struct, frozen=True):
    """Log probabilities of consecutive positions as rows: entry 0 of each row is the actual token."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]


class EngineCoreOutput(msgspec.Struct, kw_only=True):
    """Core -> front end: what one request gained in a step."""

    request_id: str
    new_token_ids: list[int]
    logprobs: TokenLogprobLists | None = None
    prompt_logprobs: TokenLogprobLists | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
