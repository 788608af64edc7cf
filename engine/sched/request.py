"""One request as the scheduler sees it: its tokens, how far they are computed, and why it ended."""

from __future__ import annotations

import enum

from ..plan import BlockIds, NewRequest
from ..request import EngineCoreOutput, EngineCoreRequest, FinishReason, TokenLogprobLists
from .hashing import BlockHash


class RequestStatus(enum.IntEnum):
    """Where a request is; everything from FINISHED_STOPPED on is final."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH_CAPPED = 4
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6

    @property
    def finish_reason(self) -> FinishReason | None:
        """What the client is told; None while the request lives."""
        reasons: dict[RequestStatus, FinishReason] = {
            RequestStatus.FINISHED_STOPPED: "stop",
            RequestStatus.FINISHED_LENGTH_CAPPED: "length",
            RequestStatus.FINISHED_ABORTED: "abort",
            RequestStatus.FINISHED_ERROR: "error",
        }
        return reasons.get(self)


class Request:
    """Written by the scheduler only.

    Attributes:
        all_token_ids: prompt and outputs; only ever appended to.
        num_computed_tokens: how many of `all_token_ids`, then of its drafts, have KV once the step in flight
            is over; 0 while the workers do not hold the request.
        num_pending: tokens that steps in flight are about to sample.
        spec_token_ids: drafts to verify in the next step.
        max_num_tokens: length at which the request ends; its last token is never computed.
        seq: place in the order of arrival; unique.
        block_hashes: of the full blocks of `all_token_ids`, as far as they were needed.
        num_cached_tokens: prompt tokens that the prefix cache saved at the first admission.
        prompt_logprobs: collected over the chunks of a prompt until its first token reports them.
    """

    __slots__ = (
        "all_token_ids",
        "block_hashes",
        "eos_token_ids",
        "first_scheduled_time",
        "max_num_tokens",
        "message",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "prompt_logprobs",
        "request_id",
        "seq",
        "spec_token_ids",
        "status",
        "stop_reason",
        "stop_token_ids",
    )

    def __init__(self, message: EngineCoreRequest, *, seq: int, max_num_tokens: int) -> None:
        params = message.params
        self.message = message
        self.request_id = message.request_id
        self.seq = seq
        self.status = RequestStatus.WAITING
        self.stop_reason: int | None = None
        self.all_token_ids = message.prompt_token_ids.copy()
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.min_num_tokens = self.num_prompt_tokens + params.min_tokens
        self.max_num_tokens = max_num_tokens
        self.eos_token_ids = frozenset(() if params.ignore_eos else message.eos_token_ids)
        self.stop_token_ids = frozenset(message.stop_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_pending = 0
        self.spec_token_ids: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.prompt_logprobs: TokenLogprobLists | None = None
        self.first_scheduled_time: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_tokens_ahead(self) -> int:
        """Tokens it has and those that steps in flight are about to sample."""
        return len(self.all_token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status >= RequestStatus.FINISHED_STOPPED

    @property
    def reads_prefix_cache(self) -> bool:
        """False when every prompt position must be computed because its log probabilities are wanted."""
        params = self.message.params
        return params.prompt_logprobs is None and not params.skip_reading_prefix_cache

    @property
    def reads_output(self) -> bool:
        """Whether its sampler must have seen every token before the next one: penalties and bad words do."""
        params = self.message.params
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        return bool(params.bad_words) or penalties != (1.0, 0.0, 0.0)

    def append_output(self, tokens: list[int]) -> list[int]:
        """Append sampled tokens up to the first that ends the request; return those that were kept."""
        for i, token in enumerate(tokens, 1):
            self.all_token_ids.append(token)
            if self._ends_with(token):
                return tokens[:i]
        return tokens

    def _ends_with(self, token: int) -> bool:
        """Whether the token just appended is the last; sets status and stop_reason if so.

        `min_tokens` holds back stop tokens but not the length limit, which may have been clamped below it.
        """
        num_tokens = len(self.all_token_ids)
        if num_tokens >= self.min_num_tokens:
            if token in self.eos_token_ids:
                self.status = RequestStatus.FINISHED_STOPPED
                return True
            if token in self.stop_token_ids:
                self.status, self.stop_reason = RequestStatus.FINISHED_STOPPED, token
                return True
        if num_tokens >= self.max_num_tokens:
            self.status = RequestStatus.FINISHED_LENGTH_CAPPED
            return True
        return False

    def add_prompt_logprobs(self, rows: TokenLogprobLists) -> None:
        """Add a chunk's rows; those of a prompt that is computed again after its first token are no news."""
        if self.num_output_tokens == 0:
            old = self.prompt_logprobs or TokenLogprobLists([], [], [])
            self.prompt_logprobs = TokenLogprobLists(
                old.token_ids + rows.token_ids, old.logprobs + rows.logprobs, old.ranks + rows.ranks
            )

    def describe(self, block_ids: BlockIds) -> NewRequest:
        """What a worker needs to know to take the request up."""
        message = self.message
        return NewRequest(
            request_id=self.request_id,
            token_ids=self.all_token_ids.copy(),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            block_ids=block_ids,
            params=message.params,
            seed=message.seed,
            stop_token_ids=sorted(self.stop_token_ids | self.eos_token_ids),
            bad_words_token_ids=message.bad_words_token_ids,
        )

    def report(
        self, tokens: list[int], *, logprobs: TokenLogprobLists | None = None, error: str | None = None
    ) -> EngineCoreOutput:
        """What the client is told of a step: tokens kept, log probabilities of just these, the end if any."""
        n = len(tokens)
        if logprobs is not None and len(logprobs.ranks) > n:
            logprobs = TokenLogprobLists(logprobs.token_ids[:n], logprobs.logprobs[:n], logprobs.ranks[:n])
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return EngineCoreOutput(
            request_id=self.request_id,
            new_token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.status.finish_reason if self.is_finished else None,
            stop_reason=self.stop_reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            first_scheduled_time=self.first_scheduled_time,
        )

    def restart(self) -> None:
        """Forget everything computed: the request will be computed again from its first token."""
        self.status = RequestStatus.PREEMPTED
        self.num_computed_tokens = 0
        self.num_preemptions += 1
        self.num_pending = 0
        self.spec_token_ids = []
        self.prompt_logprobs = None

    def __repr__(self) -> str:
        return (
            f"{self.request_id}: {self.status.name.lower()}, {self.num_computed_tokens} computed of "
            f"{self.num_prompt_tokens} prompt + {self.num_output_tokens} output tokens (limit "
            f"{self.max_num_tokens}), {len(self.spec_token_ids)} drafts, {self.num_preemptions} preemptions"
        )
