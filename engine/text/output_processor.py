"""OutputProcessor: what the core produced becomes RequestOutputs; it alone knows which request is whose."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from ...plugins.errors import RequestError
from ..request import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    TokenLogprobs,
)
from .completion import Completion, logprob_entries
from .input_processor import ProcessedInput
from .parallel_sampling import fan_out
from .tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ProcessedOutputs:
    """Outputs for users, and ids of core requests to abort because a stop string ended them here."""

    request_outputs: list[RequestOutput]
    abort_ids: list[str]


class RequestState:
    """A user's request: its prompt and its completions, one per core request."""

    def __init__(
        self, processed: ProcessedInput, children: list[EngineCoreRequest], tokenizer: Tokenizer | None
    ) -> None:
        self._text, self._core, self._tokenizer = processed.text, processed.core, tokenizer
        self.completions = [Completion(child, i, tokenizer) for i, child in enumerate(children)]
        self._running = len(children)
        self._kind = self._core.params.output_kind
        self._metrics = RequestMetrics(arrival_time=self._core.arrival_time)
        self._num_cached_tokens: int | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if self._core.params.prompt_logprobs is None else [None])

    @property
    def finished(self) -> bool:
        return self._running == 0

    def update(self, completion: Completion, output: EngineCoreOutput, now: float) -> RequestOutput | None:
        """Take in a step of one completion; what to tell the user of it, if anything."""
        self._metrics.num_preemptions += output.num_preemptions - completion.num_preemptions
        completion.update(output)
        self._running -= completion.finished
        self._note(output, now)
        if self._kind == RequestOutputKind.FINAL_ONLY:
            return self._output(self.completions, now) if self.finished else None
        # A chunk of a prompt brings no tokens, and is no news.
        return self._output([completion], now) if output.new_token_ids or completion.finished else None

    def finish(self, reason: FinishReason, error: str | None = None, code: str | None = None) -> RequestOutput:
        """End what is unfinished; the request's last output."""
        changed = [completion for completion in self.completions if not completion.finished]
        for completion in changed:
            completion.finish(reason, error, code)
        self._running = 0
        return self._output(self.completions if self._kind == RequestOutputKind.FINAL_ONLY else changed,
                            time.monotonic())

    def _note(self, output: EngineCoreOutput, now: float) -> None:
        """What an output says about the request as a whole.

        Cached tokens are those that its first completion found: the others find what that one computed.
        """
        metrics = self._metrics
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = output.first_scheduled_time
        if metrics.first_token_time is None and output.new_token_ids:
            metrics.first_token_time = now
        top = self._core.params.prompt_logprobs
        if output.prompt_logprobs is not None and self._prompt_logprobs is not None and top is not None:
            self._prompt_logprobs += logprob_entries(output.prompt_logprobs, top, self._tokenizer)

    def _output(self, completions: list[Completion], now: float) -> RequestOutput:
        delta = self._kind == RequestOutputKind.DELTA
        finished = self.finished
        if finished:
            self._metrics.finished_time = now
        prompt_logprobs = self._prompt_logprobs
        if not finished and len(prompt_logprobs or ()) < len(self._core.prompt_token_ids):
            prompt_logprobs = None
        elif delta:
            self._prompt_logprobs = None
        return RequestOutput(
            request_id=self._core.request_id,
            prompt=self._text,
            prompt_token_ids=self._core.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[completion.take(delta=delta) for completion in completions],
            finished=finished,
            num_cached_tokens=self._num_cached_tokens or 0,
            metrics=msgspec.structs.replace(self._metrics),
            delta=delta,
        )


class OutputProcessor:
    """Follows every request from `add_request` to its last output.

    CUMULATIVE and DELTA give an output for each completion that moved, with `finished` true on the last of
    all; FINAL_ONLY gives one output with all completions. Outputs for unknown ids are late news of ended
    requests, and are passed over.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, RequestState] = {}
        self._completions: dict[str, tuple[str, Completion]] = {}
        self._serials = itertools.count()

    def add_request(self, processed: ProcessedInput) -> list[EngineCoreRequest]:
        """Register a request; returns what to send to the core. Raises RequestError for an id in use."""
        user_id = processed.core.request_id
        if user_id in self._requests:
            raise RequestError(f"request id {user_id!r} is in use", param="request_id")
        children = fan_out(processed.core, next(self._serials))
        state = self._requests[user_id] = RequestState(processed, children, self._tokenizer)
        self._completions.update({c.core_id: (user_id, c) for c in state.completions})
        return children

    def process(self, outputs: list[EngineCoreOutput], now: float) -> ProcessedOutputs:
        """Turn a step's outputs into the users'. `now` is of the same monotonic clock as arrival times."""
        request_outputs, abort_ids = [], []
        for output in outputs:
            user_id, completion = self._completions.get(output.request_id, ("", None))
            if completion is None:
                continue
            state = self._requests[user_id]
            if output.error_code is not None:  # one part was refused: the rest is of no use
                abort_ids += [c.core_id for c in state.completions if not c.finished and c is not completion]
                request_outputs.append(self._end(user_id, "error", output.error, output.error_code))
                continue
            request_output = state.update(completion, output, now)
            if request_output is not None:
                request_outputs.append(request_output)
            if completion.finished:
                del self._completions[output.request_id]
                if output.finish_reason is None:
                    abort_ids.append(output.request_id)
                if state.finished:
                    del self._requests[user_id]
        return ProcessedOutputs(request_outputs=request_outputs, abort_ids=abort_ids)

    def abort(self, request_ids: Iterable[str]) -> tuple[list[RequestOutput], list[str]]:
        """End users' requests: their last outputs, and the core ids to abort. Unknown ids are passed over."""
        outputs, core_ids = [], []
        for user_id in request_ids:
            if (state := self._requests.get(user_id)) is not None:
                core_ids += [c.core_id for c in state.completions if not c.finished]
                outputs.append(self._end(user_id, "abort", None))
        return outputs, core_ids

    def fail_all(self, error: str) -> list[RequestOutput]:
        """The engine is gone: last outputs of all requests, finish_reason "error"."""
        return [self._end(user_id, "error", error) for user_id in list(self._requests)]

    def _end(self, user_id: str, reason: FinishReason, error: str | None, code: str | None = None) -> RequestOutput:
        state = self._requests.pop(user_id)
        for completion in state.completions:
            self._completions.pop(completion.core_id, None)
        return state.finish(reason, error, code)

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)


def merge_deltas(a: RequestOutput, b: RequestOutput) -> RequestOutput:
    """One output for a reader that has not taken `a` when `b` comes.

    Deltas are joined; other kinds hold all there is, so that the newer completion of an index stays.
    """
    merged = {output.index: output for output in a.outputs}
    for new in b.outputs:
        old = merged.get(new.index)
        merged[new.index] = _joined(old, new) if b.delta and old is not None else new
    return msgspec.structs.replace(
        b,
        outputs=[merged[index] for index in sorted(merged)],
        prompt_logprobs=a.prompt_logprobs if b.prompt_logprobs is None else b.prompt_logprobs,
        finished=a.finished or b.finished,
    )


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    return msgspec.structs.replace(
        new,
        text=old.text + new.text,
        token_ids=old.token_ids + new.token_ids,
        logprobs=None if old.logprobs is None or new.logprobs is None else old.logprobs + new.logprobs,
    )
