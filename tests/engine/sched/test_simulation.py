"""The whole scheduler against a fake worker that notices every wrong token, position, block and stale prefix.

A model's next token is a hash of the prefix, and a cache slot holds the hash of the prefix that it
was computed from. So outputs must be the oracle's, whatever the pool, budget, chunking, caching,
preemption, drafts and aborts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from nybble.engine.config import CacheConfig, SchedulerConfig
from nybble.engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec, Plan, Result
from nybble.engine.request import EngineCoreOutput, EngineCoreRequest, SamplingParams, TokenLogprobLists
from nybble.engine.sched.scheduler import Scheduler

VOCAB, EOS, STOP = 37, 0, 1
MAX_LEN = 32
SPEC = KVCacheSpec(shape=(2, 1, 8), dtype_bytes=4)


def prefixes(salt: str | None, tokens: list[int]) -> list[int]:
    """Hash of each prefix of `tokens`: what a slot of the fake cache holds."""
    return list(accumulate(tokens, lambda prefix, token: hash((prefix, token)), initial=len(salt or "")))[1:]


def next_token(salt: str | None, tokens: list[int]) -> int:
    return prefixes(salt, tokens)[-1] // 7 % VOCAB


def expected(request: EngineCoreRequest, limit: int) -> tuple[list[int], str, int | None]:
    """Output tokens, finish_reason and stop_reason of a request that runs alone, by the rules on paper."""
    tokens, params = list(request.prompt_token_ids), request.params
    while True:
        tokens.append(next_token(request.cache_salt, tokens))
        output = tokens[len(request.prompt_token_ids) :]
        if len(output) >= params.min_tokens and tokens[-1] in request.eos_token_ids and not params.ignore_eos:
            return output, "stop", None
        if len(output) >= params.min_tokens and tokens[-1] in request.stop_token_ids:
            return output, "stop", tokens[-1]
        if len(output) == request.max_tokens or len(tokens) == limit:
            return output, "length", None


@dataclass
class Held:
    """What the fake worker remembers of a request."""

    salt: str | None
    tokens: list[int]
    num_prompt: int
    blocks: list[list[int]]
    computed: int


@dataclass
class FakeWorker:
    """Runs plans and believes nothing: asserts that each is consistent with what it was told before."""

    layout: KVCacheLayout
    num_drafts: int
    salts: dict[str, str | None] = field(default_factory=dict)
    poisoned: set[str] = field(default_factory=set)
    held: dict[str, Held] = field(default_factory=dict)
    cache: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def execute(self, plan: Plan) -> Result:
        for request_id in plan.finished_request_ids:
            del self.held[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.held
            blocks = [list(group) for group in new.block_ids]
            self.held[new.request_id] = Held(
                self.salts[new.request_id], list(new.token_ids), new.num_prompt_tokens, blocks,
                new.num_computed_tokens,
            )  # fmt: skip
        for request_id, gained in plan.new_block_ids.items():
            for group, more in zip(self.held[request_id].blocks, gained, strict=True):
                group += more
        rows = list(zip(plan.request_ids, plan.num_tokens, plan.num_computed, strict=True))
        assert len({request_id for request_id, _, _ in rows}) == len(rows)
        # All reads come first: a step must not depend on another request of the same step.
        for request_id, _, computed in rows:
            self.check_cache(self.held[request_id], computed)
        result = Result()
        for request_id, count, _ in rows:
            self.compute(request_id, count, plan.draft_token_ids.get(request_id, []), result)
        return result

    def check_cache(self, r: Held, computed: int) -> None:
        assert r.computed == computed
        for position, prefix in enumerate(prefixes(r.salt, r.tokens[:computed])):
            assert all(self.cache[slot] == prefix for slot in self.slots(r, position)), (r, position)

    def slots(self, r: Held, position: int) -> list[tuple[int, int, int]]:
        block, offset = divmod(position, self.layout.block_size)
        assert all(0 < group[block] < self.layout.num_blocks for group in r.blocks)
        return [(g, group[block], offset) for g, group in enumerate(r.blocks)]

    def compute(self, request_id: str, count: int, drafts: list[int], result: Result) -> None:
        r = self.held[request_id]
        start, end = r.computed, r.computed + count
        tokens = r.tokens + drafts
        assert count > 0 and end <= len(tokens)
        for position, prefix in list(enumerate(prefixes(r.salt, tokens[:end])))[start:]:
            self.cache.update(dict.fromkeys(self.slots(r, position), prefix))
        if rows := tokens[start + 1 : end + 1][: max(0, r.num_prompt - 1 - start)]:
            result.prompt_logprobs[request_id] = as_logprobs(rows)
        r.computed = end
        if end < len(tokens):
            assert not drafts
            return
        if request_id in self.poisoned:
            result.errors[request_id] = "NaN"
            r.tokens.append(0)  # a step that is planned already goes on from garbage
            return
        sampled = []
        for draft in [*drafts, None]:
            sampled.append(next_token(r.salt, r.tokens))
            r.tokens.append(sampled[-1])
            if draft != sampled[-1]:
                break
        r.computed = len(r.tokens) - 1
        result.sampled[request_id] = sampled
        result.logprobs[request_id] = as_logprobs(sampled)
        # A proposer that is right most of the time, and then wrong.
        guess = list(r.tokens)
        for i in range(self.num_drafts):
            guess.append((next_token(r.salt, guess) + (guess[-1] % 4 == i)) % VOCAB)
        if self.num_drafts:
            result.draft_token_ids[request_id] = guess[len(r.tokens) :]


def as_logprobs(tokens: list[int]) -> TokenLogprobLists:
    return TokenLogprobLists([[t] for t in tokens], [[-0.5] for _ in tokens], [1 for _ in tokens])


@dataclass
class Client:
    """What a client of one request has seen so far."""

    request: EngineCoreRequest
    poisoned: bool = False
    outputs: list[EngineCoreOutput] = field(default_factory=list)
    aborted: bool = False

    @property
    def finished(self) -> bool:
        return self.aborted or bool(self.outputs and self.outputs[-1].finish_reason)

    def check(self, limit: int) -> None:
        """All that was received is right, and complete unless it was aborted."""
        tokens = [token for output in self.outputs for token in output.new_token_ids]
        logprobs = [row[0] for o in self.outputs if o.logprobs for row in o.logprobs.token_ids]
        assert logprobs == tokens
        truth, finish_reason, stop_reason = expected(self.request, limit)
        if tokens:
            prompt = [row[0] for o in self.outputs if o.prompt_logprobs for row in o.prompt_logprobs.token_ids]
            assert [bool(o.prompt_logprobs) for o in self.outputs[1:]] == [False] * len(self.outputs[1:])
            if self.request.params.prompt_logprobs is not None:
                assert prompt == self.request.prompt_token_ids[1:]
        if self.aborted:
            assert tokens == truth[: len(tokens)]
        elif self.poisoned:
            assert (tokens, self.outputs[-1].finish_reason, self.outputs[-1].error) == ([], "error", "NaN")
        else:
            last = self.outputs[-1]
            assert (tokens, last.finish_reason, last.stop_reason) == (truth, finish_reason, stop_reason)


class World:
    """A scheduler, its worker and its clients; every step is checked."""

    def __init__(
        self,
        config: dict,
        *,
        blocks: int,
        size: int,
        groups: int,
        caching: bool,
        force_preempt: float,
        drafts: int,
        ahead: bool,
    ) -> None:
        layout = KVCacheLayout(
            num_blocks=1 + max(blocks, groups * -(-4 // size)), block_size=size,
            groups=[KVCacheGroup(layers=[g], spec=SPEC) for g in range(groups)],
        )  # fmt: skip
        self.config = SchedulerConfig(**config)
        self.limit = min(MAX_LEN, layout.max_tokens)
        self.scheduler = Scheduler(
            scheduler=self.config, cache=CacheConfig(enable_prefix_caching=caching), max_model_len=MAX_LEN,
            layout=layout, force_preempt=force_preempt, strict_kv=True, clock=lambda: 1.0,
        )  # fmt: skip
        self.strictly_fcfs = self.config.scheduling_policy == "fcfs" and not force_preempt
        self.worker = FakeWorker(layout, 0 if ahead else drafts)
        self.ahead = ahead
        self.running: tuple[Plan, Result] | None = None  # what the device works on, with `ahead`
        self.clients: dict[str, Client] = {}
        self.past: list[Client] = []
        self.seen: Counter[str] = Counter()

    def add(self, fields: dict, *, request_id: str | None = None, poisoned: bool = False) -> None:
        longest = self.limit - 1
        if not self.config.enable_chunked_prefill:
            longest = min(longest, self.config.max_num_batched_tokens)
        request = EngineCoreRequest(
            request_id=request_id or str(self.seen["requests"]), seed=0,
            arrival_time=self.seen["requests"] // 2,
            **{**fields, "prompt_token_ids": fields["prompt_token_ids"][:longest]},
        )  # fmt: skip
        self.seen["requests"] += 1
        self.scheduler.add_request(request)
        self.clients[request.request_id] = Client(request, poisoned)
        self.worker.salts[request.request_id] = request.cache_salt
        self.worker.poisoned = {i for i, client in self.clients.items() if client.poisoned}

    def abort(self, picks: Iterable[int]) -> list[str]:
        live = [i for i, client in self.clients.items() if not client.finished]
        chosen = [live[pick % len(live)] for pick in picks if live]
        self.scheduler.finish_requests([*chosen, "unknown", *chosen])
        for request_id in chosen:
            self.clients[request_id].aborted = True
        return list(dict.fromkeys(chosen))

    def step(self, aborts: Iterable[int] = (), reuse: dict | None = None) -> None:
        """One step; `aborts` come while it is in flight, and other requests, `reuse`, then take their ids."""
        scheduler, config = self.scheduler, self.config
        alive, first, running = scheduler.has_unfinished(), scheduler.running[:1], self.running
        if running is not None and not (scheduler.can_run_ahead and scheduler.has_work()):
            self.running = None
            self.aborted_in_flight(aborts, reuse)
            return self.take_in(*running)
        plan = scheduler.schedule()
        if running is None:
            assert bool(plan.request_ids) == alive, "a step with live requests computed nothing"
            assert plan.request_ids[: len(first)] == [r.request_id for r in first], "the first did not advance"
        assert plan.total_tokens <= config.max_num_batched_tokens
        assert len(plan.request_ids) <= len(scheduler.running) <= config.max_num_seqs
        if config.enable_chunked_prefill and config.long_prefill_token_threshold:
            assert max(plan.num_tokens, default=0) <= config.long_prefill_token_threshold
        self.seen.update(steps=1, preempted=scheduler.stats.num_preempted, hits=scheduler.stats.prefix_hits)
        result = self.worker.execute(plan)
        self.aborted_in_flight(aborts, reuse)
        if self.ahead:
            self.seen.update(ahead=running is not None and bool(plan.request_ids))
            self.running = plan, result
            return self.take_in(*running) if running is not None else None
        self.take_in(plan, result)

    def aborted_in_flight(self, aborts: Iterable[int], reuse: dict | None) -> None:
        for request_id in self.abort(aborts):
            if reuse is not None:
                self.past.append(self.clients.pop(request_id))
                self.add(reuse, request_id=request_id)

    def take_in(self, plan: Plan, result: Result) -> None:
        for output in self.scheduler.update(plan, result):
            assert not self.clients[output.request_id].finished
            self.clients[output.request_id].outputs.append(output)
            self.seen.update([output.finish_reason, *["several tokens"] * (len(output.new_token_ids) > 1)])
        assert self.worker.held.keys() >= {r.request_id for r in self.scheduler.running}
        assert len(self.scheduler.requests) == sum(not client.finished for client in self.clients.values())

    def drain(self) -> None:
        """Run what is left to its end, within a bound, and check what everyone got."""
        live = list(self.scheduler.requests.values())
        # First come, first served: each step brings the oldest request at least one token nearer to its end.
        # With a step ahead one is planned in vain at most for each of them.
        bound = sum(r.max_num_tokens + 2 * self.ahead for r in live) * (1 if self.strictly_fcfs else 10 + len(live))
        bound *= 1 + self.ahead
        while self.scheduler.has_unfinished() and bound:
            self.step()
            bound -= 1
        assert not self.scheduler.has_unfinished(), f"starved\n{self.scheduler.dump()}"
        while self.scheduler.has_work() or self.running:
            self.step()
        assert not self.worker.held
        assert self.scheduler.kv.usage == 0.0
        assert self.scheduler.reset_prefix_cache()
        for client in [*self.past, *self.clients.values()]:
            client.check(self.limit)


CONFIGS = {
    "max_num_seqs": [1, 2, 4, 8],
    "max_num_batched_tokens": [1, 3, 8, 16, 64],
    "enable_chunked_prefill": [True, True, False],
    "scheduling_policy": ["fcfs", "priority"],
    "long_prefill_token_threshold": [0, 0, 2, 5],
    "num_lookahead_slots": [0, 0, 2],
}
WORLDS = {
    "blocks": [1, 6, 12, 16, 24], "size": [1, 2, 3, 4], "groups": [1, 1, 2], "caching": [True, False],
    "force_preempt": [0.0, 0.0, 0.3, 1.0], "drafts": [0, 0, 2],
    "ahead": [False, True],
}  # fmt: skip
PARAMS = {
    "ignore_eos": [True, False],
    "min_tokens": [0, 0, 3],
    "prompt_logprobs": [None, None, 0],
    "logprobs": [0],
    "presence_penalty": [0.0, 0.0, 0.0, 1.0],
}
REQUESTS = {
    "prompt_token_ids": [
        [2],
        [2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7, 2, 3],
        [4, 3, 2] * 3,
        [2, 3, 4, 5, 6, 7, 8, 9] * 2,
    ],
    "max_tokens": [1, 4, 12, 30],
    "eos_token_ids": [[], [EOS], [EOS, 2, 3, 4, 5]],
    "stop_token_ids": [[], [STOP], [STOP, EOS]],
    "priority": [-1, 0, 0, 1],
    "cache_salt": [None, None, "s"],
}


def drawn(table: dict[str, list]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in table.items()})


def chosen(table: dict[str, list], rng: random.Random) -> dict:
    return {name: rng.choice(values) for name, values in table.items()}


def with_params(fields: dict, params: dict) -> dict:
    return {**fields, "params": SamplingParams(**params)}


DRAWN_REQUESTS = st.builds(with_params, drawn(REQUESTS), drawn(PARAMS))


class SchedulerMachine(RuleBasedStateMachine):
    """Clients come, go and change their minds; afterwards everything that is left runs to its end."""

    world: World | None = None

    @initialize(config=drawn(CONFIGS), world=drawn(WORLDS))
    def start(self, config, world):
        self.world = World(config, **world)

    @rule(burst=st.lists(DRAWN_REQUESTS, min_size=1, max_size=5), poisoned=st.sampled_from([False] * 5 + [True]))
    def arrive(self, burst, poisoned):
        for i, fields in enumerate(burst):
            self.world.add(fields, poisoned=poisoned and not i)

    @precondition(lambda self: self.world.scheduler.has_work())
    @rule(steps=st.integers(1, 12))
    def run(self, steps):
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.scheduler.has_unfinished())
    @rule(aborts=st.lists(st.integers(0, 9), min_size=1, max_size=3), reuse=st.none() | DRAWN_REQUESTS)
    def step_with_aborts_in_flight(self, aborts, reuse):
        self.world.step(aborts, reuse)

    @rule(picks=st.lists(st.integers(0, 9), max_size=3))
    def abort_between_steps(self, picks):
        self.world.abort(picks)

    @rule()
    def reset_prefix_cache(self):
        scheduler = self.world.scheduler
        assert scheduler.reset_prefix_cache() == (not scheduler.running)

    def teardown(self):
        if self.world is not None:
            self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(deadline=None, max_examples=100, stateful_step_count=20)


def test_crowded_worlds():
    """Seeded worlds with more demand than blocks: preemption, hits and drafts all happen, and often."""
    rng, seen = random.Random(0), Counter()
    configs = {**CONFIGS, "max_num_seqs": [4, 8], "max_num_batched_tokens": [8, 16, 64]}
    worlds = {**WORLDS, "blocks": [12, 16, 24], "force_preempt": [0.0, 0.0, 0.0, 0.3]}
    for _ in range(100):
        world = World(chosen(configs, rng), **chosen(worlds, rng))
        for _ in range(rng.randint(10, 30)):
            world.add(with_params(chosen(REQUESTS, rng), chosen(PARAMS, rng)), poisoned=rng.random() < 0.05)
            for _ in range(rng.choice([0, 0, 1, 4])):
                world.step([rng.randrange(9)] * (rng.random() < 0.05))
        world.drain()
        if not world.scheduler._force_preempt:
            seen["preempted for room"] += world.seen["preempted"]
        seen += world.seen
    often = ("preempted for room", "hits", "several tokens", "stop", "error", "ahead")
    assert all(seen[name] > 50 for name in often), seen
