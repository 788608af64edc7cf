"""One completion as it grows: tokens, text up to a stop string, log probabilities."""

from __future__ import annotations

from ..request import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    Logprob,
    TokenLogprobLists,
    TokenLogprobs,
)
from .detokenizer import Detokenizer, StopMatch, StopStrings
from .tokenizer import Tokenizer


def logprob_entries(rows: TokenLogprobLists, top: int, tokenizer: Tokenizer | None) -> list[TokenLogprobs]:
    """Rows of the core as {token id: Logprob}: the actual token first, then the `top` likeliest (-1: all of
    the row).

    The actual token is not repeated when it is among the likeliest. Without a tokenizer `decoded_token` is
    None.
    """
    entries = []
    for ids, values, rank in zip(rows.token_ids, rows.logprobs, rows.ranks):
        width = len(ids) if top < 0 else top + 1
        entries.append({
            token: Logprob(value, place or rank, None if tokenizer is None else tokenizer.token_text(token))
            for place, (token, value) in enumerate(zip(ids[:width], values))
        })
    return entries


class Completion:
    """State of one request of the core. `update` takes what it gained, `take` says what to report.

    Attributes:
        index: position among the completions of the user's request.
        num_preemptions: how often the scheduler put it back, so far.
    """

    def __init__(self, core: EngineCoreRequest, index: int, tokenizer: Tokenizer | None) -> None:
        params = core.params
        self.core_id, self.index, self.num_preemptions = core.request_id, index, 0
        self._params, self._tokenizer = params, tokenizer
        self._end_ids = frozenset((*core.stop_token_ids, *(() if params.ignore_eos else core.eos_token_ids)))
        self._detokenizer = None if tokenizer is None or not params.detokenize else Detokenizer(
            tokenizer, core.prompt_token_ids, skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens)
        self._stops = None if not params.stop_strings else StopStrings(
            params.stop_strings, include_in_output=params.include_stop_str_in_output)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = None if params.logprobs is None else 0.0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._error_code: str | None = None
        self._sent_chars = self._sent_tokens = 0

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def update(self, output: EngineCoreOutput) -> None:
        """Take in a step's tokens; a stop string in their text finishes the completion."""
        self.num_preemptions = output.num_preemptions
        self._finish_reason, self._stop_reason = output.finish_reason, output.stop_reason
        self._error = output.error
        self._token_ids += output.new_token_ids
        if self._logprobs is not None and self._params.logprobs is not None and output.logprobs is not None:
            self._logprobs += logprob_entries(output.logprobs, self._params.logprobs, self._tokenizer)
            self._cumulative_logprob = (self._cumulative_logprob or 0.0) + sum(
                row[0] for row in output.logprobs.logprobs)
        if match := self._append_text(output.new_token_ids):
            self._finish_reason, self._stop_reason = "stop", match.stop
            self._text = self._text[:match.end]

    def finish(self, reason: FinishReason, error: str | None = None, code: str | None = None) -> None:
        """End it from this side: aborted, refused, or the engine is gone."""
        self._finish_reason, self._error, self._error_code = reason, error, code
        if self._detokenizer is not None:
            self._text += self._detokenizer.flush()

    def take(self, *, delta: bool) -> CompletionOutput:
        """What to report: all so far, or with `delta` what came since the last call.

        Text that may turn out to be a stop string is not reported before the end; its tokens are.
        """
        hold_back = 0 if self._stops is None or self.finished else self._stops.hold_back
        chars = max(0, len(self._text) - hold_back)
        first_char, first_token = (self._sent_chars, self._sent_tokens) if delta else (0, 0)
        self._sent_chars, self._sent_tokens = chars, len(self._token_ids)
        return CompletionOutput(
            index=self.index,
            text=self._text[first_char:chars],
            token_ids=self._token_ids[first_token:],
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            error=self._error,
            error_code=self._error_code,
        )

    def _append_text(self, token_ids: list[int]) -> StopMatch | None:
        """Decode the new tokens, and look for a stop string that ends in the text behind `min_tokens`."""
        if self._detokenizer is None:
            return None
        total, min_tokens = len(self._token_ids), self._params.min_tokens
        before = total - len(token_ids)
        if self._finish_reason == "stop" and token_ids and token_ids[-1] in self._end_ids:
            # The token that ended the text is no part of it, unless the user wants what stopped it.
            token_ids = token_ids if self._params.include_stop_str_in_output else token_ids[:-1]
        exempt = max(0, min_tokens - before)
        self._text += self._detokenizer.push(token_ids[:exempt])
        checked = len(self._text)
        self._text += self._detokenizer.push(token_ids[exempt:])
        if self._finish_reason is not None:
            self._text += self._detokenizer.flush()
        if self._stops is None or total <= min_tokens or self._finish_reason in ("abort", "error"):
            return None
        return self._stops.find(self._text, checked)
