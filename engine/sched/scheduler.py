"""The scheduler: decides what every request computes in a step, and takes in what the step produced."""

from __future__ import annotations

import bisect
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

from ...plugins.errors import RequestError
from ...plugins.log import get_logger
from ..config import CacheConfig, SchedulerConfig
from ..metrics import StepStats
from ..plan import KVCacheLayout, Plan, Result
from ..request import EngineCoreOutput, EngineCoreRequest
from .kv_cache_manager import KVCacheManager
from .queue import create_request_queue
from .request import Request, RequestStatus

logger = get_logger(__name__)

DUMP_ROWS = 20


class Planned(NamedTuple):
    """A request's part of a step in flight: `end` tokens are computed after it, and perhaps one is sampled.

    The request and not its id: when the result comes, an aborted request's id may be in use again.
    """

    request: Request
    end: int
    samples: bool


class InFlight(NamedTuple):
    """A step whose result is not in yet: its requests in the plan's order, and what is counted of it."""

    step: int
    started: float
    requests: list[Planned]
    stats: StepStats


class Scheduler:
    """Continuous batching without phases: each request lets its computed tokens catch up with its tokens.

    A step goes through `running`, then `waiting`, under one token budget. `running` is always sorted by the
    queue's `urgency`, and room is made by preempting its last request. Three properties follow:

    * a step never takes back what it planned: the victim comes after the request that needs room, or is it;
    * the first running request always advances: once it is alone, the whole pool is free but for its own
      blocks, and `add_request` let in nothing larger than that;
    * so every step with live requests computes at least one token, and every request ends.

    A newcomer gets blocks for all its present tokens at once, so a prompt that is computed in chunks never
    runs out of blocks half-way; and it leaves a block for each running request, whose growth would else soon
    push it out again.

    `num_computed_tokens` advances in `schedule`, before the result is known; `update` takes back what the
    rejected drafts had added. So a step can be planned while the one before it runs (`can_run_ahead`): a request whose
    next token is being sampled counts it (`num_pending`), and the worker knows where to find it. One that turns out
    to have ended was computed for nothing, and that result is dropped, as is the token of one that was preempted
    in between: it is sampled again, the same.

    Args:
        log_steps: log one line per step.
        force_preempt: probability per step of preempting a random running request but the first; for tests.
        strict_kv: check every invariant after each step; for tests.
        seed: of the random choice that `force_preempt` makes.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        scheduler: SchedulerConfig,
        cache: CacheConfig,
        max_model_len: int,
        layout: KVCacheLayout,
        log_steps: bool = False,
        force_preempt: float = 0.0,
        strict_kv: bool = False,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = scheduler
        self.max_model_len = max_model_len
        self.layout = layout
        self.kv = KVCacheManager(
            layout,
            enable_prefix_caching=cache.enable_prefix_caching,
            num_lookahead_slots=scheduler.num_lookahead_slots,
        )
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting = create_request_queue(scheduler.scheduling_policy)
        self.stats = StepStats()
        # Most tokens of one request in a step.
        threshold = scheduler.long_prefill_token_threshold if scheduler.enable_chunked_prefill else 0
        self._max_chunk = threshold or scheduler.max_num_batched_tokens
        self._finished_ids: list[str] = []
        self._in_flight: deque[InFlight] = deque()
        self._num_steps = 0
        self._num_requests = 0
        self._log_steps, self._force_preempt, self._strict_kv = log_steps, force_preempt, strict_kv
        self._rng = random.Random(seed)
        self._clock = clock

    # -- requests come and go

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use, it can never fit, or too many wait already.
        """
        self._check_admissible(request)
        limit = min(self.max_model_len, self.layout.max_tokens)
        max_num_tokens = min(len(request.prompt_token_ids) + request.max_tokens, limit)
        new = Request(request, seq=self._num_requests, max_num_tokens=max_num_tokens)
        self._num_requests += 1
        self.requests[new.request_id] = new
        self.waiting.add(new)

    def _check_admissible(self, request: EngineCoreRequest) -> None:
        config, num_prompt = self.config, len(request.prompt_token_ids)
        assert num_prompt and request.max_tokens > 0, "the front end lets no empty request through"
        if request.request_id in self.requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use", param="request_id", fix="choose another id"
            )
        for limit, what, fix in (
            (self.max_model_len, "max_model_len", "raise --max-model-len if the model allows it"),
            (
                self.layout.max_tokens,
                "what the KV cache holds",
                "give the KV cache more memory: --gpu-memory-utilization or --kv-cache-memory-bytes",
            ),
        ):
            if num_prompt + 1 > limit:
                raise RequestError(
                    f"the prompt and one output token are longer than {what}",
                    param="prompt",
                    code="context_length_exceeded",
                    found=f"{num_prompt} prompt tokens, at most {limit} tokens in all",
                    fix=f"shorten the prompt, or {fix}",
                )
        if not config.enable_chunked_prefill and num_prompt > config.max_num_batched_tokens:
            raise RequestError(
                "the prompt is longer than one step and chunked prefill is off",
                param="prompt",
                code="context_length_exceeded",
                found=f"{num_prompt} prompt tokens, max_num_batched_tokens {config.max_num_batched_tokens}",
                fix="shorten the prompt, turn --enable-chunked-prefill on, or raise --max-num-batched-tokens",
            )
        if config.max_queue and len(self.waiting) >= config.max_queue:
            raise RequestError(
                "too many requests are waiting",
                code="engine_overloaded",
                found=f"{len(self.waiting)} waiting, max_queue {config.max_queue}",
                fix="try again later, or raise --max-queue",
            )

    def finish_requests(self, request_ids: Iterable[str]) -> None:
        """Abort requests and free their blocks at once; unknown and finished ids are ignored.

        Allowed while a step is in flight: its result for these requests is dropped. Their blocks may go to
        others at once, since workers run steps in order.
        """
        aborted = [self.requests[i] for i in dict.fromkeys(request_ids) if i in self.requests]
        if not aborted:
            return
        if queued := {r for r in aborted if r.status is not RequestStatus.RUNNING}:
            self.waiting.remove(queued)
        for request in aborted:
            request.status = RequestStatus.FINISHED_ABORTED
            self._release(request)
        self._drop_finished()

    def _release(self, request: Request) -> None:
        """Let go of a finished request; the caller takes it out of its queue."""
        if request.num_computed_tokens:  # else workers never heard of it, or were told when it was preempted
            self._finished_ids.append(request.request_id)
        self.kv.free(request)
        del self.requests[request.request_id]

    def _drop_finished(self) -> None:
        self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    def has_work(self) -> bool:
        """Whether `schedule` has something to tell the workers: live requests, or finished ones to forget."""
        return bool(self.requests or self._finished_ids)

    def levels(self) -> StepStats:
        """How it stands now, with nothing counted."""
        return StepStats(step=self._num_steps, num_running=len(self.running), num_waiting=len(self.waiting),
                         kv_usage=self.kv.usage)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while requests hold blocks."""
        return self.kv.reset_prefix_cache()

    # -- a step is planned

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step may be planned before the last one's result is in.

        Not when a sampler must see a token that is still being sampled: penalties, bad words, logits processors.
        """
        return len(self._in_flight) < 2 and not any(planned.request.reads_output for planned in self._last_planned)

    @property
    def _last_planned(self) -> list[Planned]:
        return self._in_flight[-1].requests if self._in_flight else []

    def schedule(self) -> Plan:
        """Plan the next step. A plan may have no requests and still tell workers whom to forget."""
        assert len(self._in_flight) < 2 and (not self._in_flight or self.can_run_ahead), "too far ahead"
        self._num_steps += 1
        step = InFlight(self._num_steps, self._clock(), [], StepStats(step=self._num_steps))
        self._in_flight.append(step)
        self.stats = step.stats
        plan = Plan(
            step=self._num_steps,
            request_ids=[],
            num_tokens=[],
            num_computed=[],
            finished_request_ids=self._finished_ids,
        )
        self._finished_ids = []
        if len(self.running) > 1 and self._rng.random() < self._force_preempt:
            self._preempt(self._rng.randrange(1, len(self.running)), plan)
        budget = self._schedule_running(plan)
        # Who was preempted needs room more than a newcomer does.
        if not self.stats.num_preempted:
            self._schedule_waiting(plan, budget)
        assert any(planned.requests for planned in self._in_flight) or not self.requests, f"no progress\n{self.dump()}"
        self.stats.schedule_seconds = self._clock() - step.started
        return plan

    def _schedule_running(self, plan: Plan) -> int:
        """Let running requests advance in order of urgency; return what is left of the token budget."""
        budget, max_chunk = self.config.max_num_batched_tokens, self._max_chunk
        allocate = self.kv.allocate_slots
        index = 0
        while budget and index < len(self.running):
            request = self.running[index]
            computed = request.num_computed_tokens
            # A draft at or past the last position of a request can never be kept.
            num_tokens = min(
                request.num_tokens_ahead + len(request.spec_token_ids) - computed,
                request.max_num_tokens - 1 - computed,
                max_chunk,
                budget,
            )
            if not num_tokens:  # its last token is being sampled
                index += 1
                continue
            while (block_ids := allocate(request, computed + num_tokens)) is None:
                self._preempt(-1, plan)
                if request.status is RequestStatus.PREEMPTED:
                    return budget  # it was the last itself
            if block_ids:
                plan.new_block_ids[request.request_id] = block_ids
            self._plan(request, num_tokens, plan)
            budget -= num_tokens
            index += 1
        return budget

    def _schedule_waiting(self, plan: Plan, budget: int) -> None:
        """Admit waiting requests in order, up to the first for which there is no budget, seat or room."""
        while budget and self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.peek()
            hits = self.kv.get_computed_blocks(request)
            num_cached = len(hits[0]) * self.kv.block_size
            num_todo = request.num_tokens - num_cached
            num_tokens = min(num_todo, self._max_chunk, budget)
            # A resumed request is prompt and outputs, which may exceed any step: it is chunked in any case.
            whole = not self.config.enable_chunked_prefill and not request.num_preemptions
            if whole and num_tokens < num_todo:
                return
            spare = len(self.running)
            if self.kv.allocate_slots(request, request.num_tokens, computed=hits, num_spare=spare) is None:
                return
            self.waiting.pop()
            bisect.insort(self.running, request, key=self.waiting.urgency)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_cached
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._clock()
                request.num_cached_tokens = num_cached
                if self.kv.reads_cache(request):
                    self.stats.prefix_queries += request.num_tokens
                    self.stats.prefix_hits += num_cached
            plan.new_requests.append(request.describe(self.kv.get_block_ids(request)))
            self._plan(request, num_tokens, plan)
            budget -= num_tokens

    def _plan(self, request: Request, num_tokens: int, plan: Plan) -> None:
        """Enter `num_tokens` more tokens of a request into the plan."""
        computed = request.num_computed_tokens
        samples = computed + num_tokens >= request.num_tokens_ahead
        self._in_flight[-1].requests.append(Planned(request, computed + num_tokens, samples))
        request.num_pending += samples
        plan.request_ids.append(request.request_id)
        plan.num_tokens.append(num_tokens)
        plan.num_computed.append(computed)
        request.num_computed_tokens = computed + num_tokens
        if computed < request.num_prompt_tokens:
            self.stats.prompt_tokens += min(num_tokens, request.num_prompt_tokens - computed)
        if request.spec_token_ids:
            if drafts := request.spec_token_ids[: computed + num_tokens - request.num_tokens]:
                plan.draft_token_ids[request.request_id] = drafts
            request.spec_token_ids = []

    def _preempt(self, index: int, plan: Plan) -> None:
        """Send a running request back to wait; workers forget it, and it is computed again from the start."""
        request = self.running.pop(index)
        assert self.running, f"a lone request ran out of blocks\n{self.dump()}"
        self.kv.free(request)
        request.restart()
        self.waiting.prepend(request)
        plan.finished_request_ids.append(request.request_id)
        self.stats.num_preempted += 1

    # -- a step is over

    def update(self, plan: Plan, result: Result) -> list[EngineCoreOutput]:
        """Take in what a plan produced and return what its requests gained, in the plan's order.

        Requests that were aborted in the meantime are passed over.
        """
        step = self._in_flight.popleft()
        assert plan.step == step.step, f"step {plan.step} is not the oldest in flight, {step.step}"
        outputs, self.stats = [], step.stats
        for planned in step.requests:
            request = planned.request
            if request.status is not RequestStatus.RUNNING:
                continue
            output = self._update_request(planned, plan, result)
            if output is not None:
                outputs.append(output)
                self.stats.generated_tokens += len(output.new_token_ids)
                if output.finish_reason:
                    self._release(request)
        self._drop_finished()
        now = self.levels()
        self.stats.num_running, self.stats.num_waiting = now.num_running, now.num_waiting
        self.stats.kv_usage = now.kv_usage
        if self._strict_kv:
            self.check()
        if self._log_steps:
            self._log(plan, step.started)
        return outputs

    def _update_request(self, planned: Planned, plan: Plan, result: Result) -> EngineCoreOutput | None:
        """Take in one request's part of a result; None when its chunk did not reach its last token."""
        request, end, samples = planned
        request_id = request.request_id
        if request_id in result.errors:
            request.status = RequestStatus.FINISHED_ERROR
            return request.report([], error=result.errors[request_id])
        if request_id in result.prompt_logprobs:
            request.add_prompt_logprobs(result.prompt_logprobs[request_id])
        sampled = result.sampled.get(request_id)
        assert (sampled is not None) == samples, f"sampled {sampled} for {request}"
        if sampled is None:
            self.kv.cache_blocks(request, end)
            return None
        request.num_pending -= 1
        num_drafts = len(plan.draft_token_ids.get(request_id, ()))
        assert 0 < len(sampled) <= num_drafts + 1, f"sampled {sampled} for {num_drafts} drafts of {request}"
        rejected = num_drafts + 1 - len(sampled)
        request.num_computed_tokens -= rejected
        kept = request.append_output(sampled)
        self.kv.cache_blocks(request, end - rejected)
        if result.draft_token_ids:
            request.spec_token_ids = result.draft_token_ids.get(request_id, [])
        return request.report(kept, logprobs=result.logprobs.get(request_id))

    # -- what can be seen from outside

    def _log(self, plan: Plan, started: float) -> None:
        stats, milliseconds = self.stats, 1e3 * (self._clock() - started)
        logger.info(
            "step %d: %d running, %d waiting, %d new + %d cached tokens, %d preempted, KV %.1f%%, %.2f ms",
            plan.step, stats.num_running, stats.num_waiting, plan.total_tokens, stats.prefix_hits,
            stats.num_preempted, 100 * stats.kv_usage, milliseconds,
        )  # fmt: skip

    def dump(self) -> str:
        """The state in one screen, for error reports. Holds no prompt or output text."""
        pool = self.kv.pool
        lines = [
            f"scheduler at step {self._num_steps}: {len(self.running)} running, {len(self.waiting)} waiting, "
            f"{sum(len(step.requests) for step in self._in_flight)} in flight, "
            f"{pool.num_free_blocks} of {len(pool.blocks) - 1} blocks of {self.kv.block_size} tokens free, "
            f"{len(pool.cached)} cached"
        ]
        for name, queue in (("running", self.running), ("waiting", self.waiting)):
            lines += [f"  {request!r}" for request in islice(queue, DUMP_ROWS)]
            if len(queue) > DUMP_ROWS:
                lines.append(f"  and {len(queue) - DUMP_ROWS} more {name}")
        return "\n".join(lines)

    def check(self) -> None:
        """Raise AssertionError unless queues, requests, tables and pool agree with each other."""
        runs, waits = {RequestStatus.RUNNING}, {RequestStatus.WAITING, RequestStatus.PREEMPTED}
        waiting = list(self.waiting)
        assert all(r.status in runs and r.num_computed_tokens for r in self.running), self.dump()
        assert all(r.status in waits and not r.num_computed_tokens for r in waiting), self.dump()
        assert self.running == sorted(self.running, key=self.waiting.urgency), "running is out of order"
        assert len(self.running) <= self.config.max_num_seqs, "too many requests run"
        assert set(self.requests.values()) == {*self.running, *waiting}, "a request is lost or left over"
        assert len(self.requests) == len(self.running) + len(waiting), "a request is queued twice"
        self.kv.check(self.running)
