"""InputProcessor: a prompt and its parameters become a request that the core runs without further checks."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ...plugins.errors import CheckpointError, RequestError
from ...plugins.log import get_logger
from ..config import EngineConfig
from ..request import MAX_REQUEST_BYTES, EngineCoreRequest, SamplingParams
from .parallel_sampling import SEEDS
from .tokenizer import Tokenizer

log = get_logger(__name__)

MAX_CHARS_PER_TOKEN = 16
DEFAULTS_FROM_GENERATION_CONFIG = {
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k",
    "top_p": "top_p", "min_p": "min_p", "max_new_tokens": "max_tokens",
}


PromptType = str | list[int] | dict[str, Any]
"""A text, token ids, or {"prompt": text, "prompt_token_ids": ids}: one of them, or both and the ids count."""


@dataclass(frozen=True, kw_only=True)
class ProcessedInput:
    """A request ready for the core, and the prompt's text where there was one."""

    text: str | None
    core: EngineCoreRequest


def check_token_ids(ids: Iterable[Any], vocab_size: int, param: str) -> list[int]:
    """The ids as a list. The one check that stands between users' token ids and tensors they index.

    Raises RequestError for an id that is not an integer in [0, vocab_size), naming `param`.
    """
    checked = list(ids)
    if checked and (set(map(type, checked)) != {int} or min(checked) < 0 or max(checked) >= vocab_size):
        wrong = next(i for i in checked if type(i) is not int or not 0 <= i < vocab_size)
        raise RequestError(f"{param} holds a token id outside the model's vocabulary", param=param,
                           found=repr(wrong)[:80], known=[f"0 to {vocab_size - 1}"])
    return checked


def as_the_core_reads_it(core: EngineCoreRequest) -> EngineCoreRequest:
    """The request after a round trip through its wire form, wherever the core runs.

    Python checks no types, and a value of a wrong one would otherwise be found by the engine process, too late to
    blame the request. Raises RequestError for such a value, and for a request larger than a message may be.
    """
    try:
        data = msgspec.msgpack.encode(core)
        if len(data) > MAX_REQUEST_BYTES:
            raise RequestError("the request is too large", code="request_too_large", found=f"{len(data)} bytes",
                               known=[f"at most {MAX_REQUEST_BYTES}"])
        return msgspec.msgpack.decode(data, type=EngineCoreRequest)
    except (TypeError, OverflowError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("a value of the request has a wrong type", found=str(error)) from error


class InputProcessor:
    """Tokenizes, checks and completes requests.

    Args:
        config: of the engine; its context length, vocabulary, limits, seed and end tokens.
        tokenizer: None serves token ids only.

    A request without a seed gets one from the engine's seed and the number of requests before it: requests
    differ, and the same requests in the same order give the same tokens in the next run.

    Raises CheckpointError when the tokenizer has tokens that the model has not, or generation_config.json
    holds sampling values that no request could use.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        self._model, self._scheduling_policy = config.model, config.scheduler.scheduling_policy
        self._tokenizer = tokenizer
        self._counter = itertools.count()
        if tokenizer is not None and tokenizer.max_token_id >= config.model.vocab_size:
            raise CheckpointError(
                "the tokenizer has tokens that the model has not",
                found=f"token id {tokenizer.max_token_id}, but the model's vocabulary ends at "
                      f"{config.model.vocab_size - 1}",
                fix="give the model's own tokenizer with --tokenizer, or take the added tokens out of it")
        self._eos_token_ids = self._end_tokens()
        try:
            SamplingParams(**self.default_sampling_params())
        except (RequestError, TypeError) as error:
            raise CheckpointError("generation_config.json holds sampling values that are out of range",
                                  found=error,
                                  fix="mend the file, or start with --generation-config vllm") from error

    def _end_tokens(self) -> list[int]:
        """Ids that end a text: the checkpoint's configs first, then the tokenizer's eos."""
        ids = list(self._model.eos_token_ids)
        tokenizer_eos = None if self._tokenizer is None else self._tokenizer.eos_token_id
        if tokenizer_eos is not None and tokenizer_eos not in ids:
            if ids:
                log.warning("the tokenizer ends a text with token %d, the config with %s: all of them do",
                            tokenizer_eos, ids)
            ids.append(tokenizer_eos)
        usable = [i for i in dict.fromkeys(ids) if 0 <= i < self._model.vocab_size]
        if len(usable) < len(set(ids)):
            log.warning("end tokens %s are not all in the vocabulary of %d; those are ignored", ids,
                        self._model.vocab_size)
        return usable

    def default_sampling_params(self) -> dict[str, Any]:
        """What the checkpoint's generation_config suggests, by SamplingParams field (those vLLM reads)."""
        config = self._model.generation_config
        return {field: config[key] for key, field in DEFAULTS_FROM_GENERATION_CONFIG.items()
                if config.get(key) is not None}

    def process(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
    ) -> ProcessedInput:
        """Check a request against the model and tokenize what is text in it.

        Args:
            prompt: a text, token ids, or a dict of them.
            priority: lower goes first; needs the "priority" scheduling policy.
            cache_salt: requests share cached blocks only with requests of the same salt.
            arrival_time: seconds of the monotonic clock; None is now.

        `max_tokens` is cut to what the context has left after the prompt. `truncate_prompt_tokens` keeps the
        prompt's last tokens; -1 keeps what leaves room for one more.

        Raises RequestError, with code "context_length_exceeded" for a prompt that does not fit.
        """
        if priority and self._scheduling_policy != "priority":
            raise RequestError("priority needs the priority scheduling policy", param="priority",
                               found=priority, fix="start with --scheduling-policy priority")
        self._check_params(params)
        text, ids = self._prompt(prompt)
        ids = check_token_ids(self._fit(ids, params.truncate_prompt_tokens), self._model.vocab_size, "prompt")
        room = self._model.max_model_len - len(ids)
        core = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            params=params,
            seed=self._seed(params.seed),
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            stop_token_ids=list(dict.fromkeys(params.stop_token_ids or ())),
            eos_token_ids=self._eos_token_ids,
            bad_words_token_ids=self._bad_words(params.bad_words or ()),
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
        )
        return ProcessedInput(text=text, core=as_the_core_reads_it(core))

    def _check_params(self, params: SamplingParams) -> None:
        vocab = self._model.vocab_size
        for param, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias),
                           ("allowed_token_ids", params.allowed_token_ids)):
            if ids is not None and len(ids) > vocab:
                raise RequestError(f"{param} has more entries than the model has tokens", param=param,
                                   found=len(ids), known=[f"at most {vocab}"])
            check_token_ids(ids or (), vocab, param)
        cap = self._model.max_logprobs
        for param, asked in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            wanted = vocab if asked == -1 else asked
            if wanted is not None and wanted > cap != -1:
                raise RequestError(f"{param} is at most {cap} here", param=param, found=asked,
                                   fix="start with a larger --max-logprobs, or -1 for no limit")
        if self._tokenizer is None and (params.stop_strings or params.bad_words):
            param = "stop" if params.stop_strings else "bad_words"
            raise RequestError(f"{param} needs a tokenizer, and this engine has none", param=param,
                               found="skip_tokenizer_init", fix="use stop_token_ids or logit_bias")

    def _prompt(self, prompt: PromptType) -> tuple[str | None, list[int]]:
        """Text and token ids of a prompt, of whatever length and values."""
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        given: Mapping[str, Any] = {key: prompt}
        if isinstance(prompt, dict):
            given = prompt
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        typed = isinstance(text, str | None) and isinstance(ids, list | None)
        if not typed or (text is None and ids is None) or not given.keys() <= {"prompt", "prompt_token_ids"}:
            raise RequestError(
                "a prompt is a text, a list of token ids or a dict of them", param="prompt",
                found=f"dict with {sorted(map(str, prompt))}" if prompt is given else type(prompt).__name__,
                known=["str", "list[int]", '{"prompt": str}', '{"prompt_token_ids": list[int]}'])
        if ids is not None:
            return text, ids
        assert text is not None
        return text, self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and this engine has none", param="prompt",
                               found="skip_tokenizer_init", fix="send token ids")
        limit = MAX_CHARS_PER_TOKEN * self._model.max_model_len
        if len(text) > limit:
            raise RequestError(f"a prompt has at most {limit} characters here", param="prompt",
                               code="context_length_exceeded", found=f"{len(text)} characters",
                               fix=f"the model's context is {self._model.max_model_len} tokens")
        # Not left to the tokenizer: one that puts bos in front would turn "" into a prompt.
        return self._tokenizer.encode(text) if text else []

    def _fit(self, ids: list[int], truncate: int | None) -> list[int]:
        """The prompt's last tokens that `truncate` keeps. Raises RequestError for none, or too many."""
        context = self._model.max_model_len
        if truncate == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1",
                               param="truncate_prompt_tokens", found=0)
        if truncate is not None:
            ids = ids[-(context - 1 if truncate == -1 else truncate):]
        if not ids:
            raise RequestError("the prompt has no tokens", param="prompt", found="an empty prompt",
                               fix="send at least one token, such as the model's bos")
        if len(ids) >= context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the model's context is {context} tokens, one of them for "
                "the answer", param="prompt", code="context_length_exceeded",
                fix="shorten it, or set truncate_prompt_tokens to -1")
        return ids

    def _seed(self, asked: int | None) -> int:
        """An unsigned 64-bit seed; negative ones wrap round."""
        number = next(self._counter)
        if asked is not None:
            return asked % SEEDS
        digest = hashlib.blake2b(f"{self._model.seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Token sequences that must not appear: each word as a text's start and, where that makes another
        word token of the same length, behind a space (vLLM's rule)."""
        sequences: list[list[int]] = []
        for word in words:
            assert self._tokenizer is not None, "checked in _check_params"
            plain = self._tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if not plain:
                raise RequestError("a bad word must have at least one token", param="bad_words",
                                   found=repr(word)[:80])
            check_token_ids(plain + spaced, self._model.vocab_size, "bad_words")
            sequences.append(plain)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                sequences.append(spaced)
        return sequences
