"""The KV-cache manager against a naive model of lists and token tuples, and its named edge cases."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nybble.engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec
from nybble.engine.request import EngineCoreRequest, SamplingParams
from nybble.engine.sched.kv_cache_manager import KVCacheManager
from nybble.engine.sched.request import Request

SPEC = KVCacheSpec(shape=(2, 1, 8), dtype_bytes=4)
LIMIT = 24
PLAIN, WHOLE = SamplingParams(), SamplingParams(prompt_logprobs=0)


def make_layout(blocks: int, size: int, groups: int = 1) -> KVCacheLayout:
    return KVCacheLayout(
        num_blocks=blocks,
        block_size=size,
        groups=[KVCacheGroup(layers=[i], spec=SPEC) for i in range(groups)],
    )


def make_request(name: str, tokens: list[int], salt: str | None = None, params: SamplingParams = PLAIN) -> Request:
    message = EngineCoreRequest(
        request_id=name, prompt_token_ids=tokens, params=params, seed=0, max_tokens=LIMIT, cache_salt=salt
    )
    return Request(message, seq=0, max_num_tokens=LIMIT)


class NaiveCache:
    """What the manager should do, with a list for the free queue and token tuples for hashes."""

    def __init__(self, blocks: int, size: int, groups: int, lookahead: int) -> None:
        self.size, self.groups, self.lookahead = size, range(groups), lookahead
        self.free = list(range(1, blocks))
        self.refs: Counter[int] = Counter()
        self.cached: dict[tuple, int] = {}
        self.tables: dict[str, list[list[int]]] = {}
        self.offered: dict[str, int] = {}

    def key(self, r: Request, i: int, group: int) -> tuple:
        return r.message.cache_salt, tuple(r.all_token_ids[: (i + 1) * self.size]), group

    def hits(self, r: Request) -> list[list[int]]:
        hits: list[list[int]] = [[] for _ in self.groups]
        for i in range((r.num_tokens - 1) // self.size):
            found = [self.cached.get(self.key(r, i, g)) for g in self.groups]
            if None in found:
                break
            for hit, block in zip(hits, found):
                hit.append(block)
        return hits

    def allocate(self, r: Request, tokens: int, hits: list[list[int]], spare: int) -> list[list[int]] | None:
        name, new = r.request_id, name_is_new(self.tables, r)
        table = hits if new else self.tables[name]
        slots = min(tokens + self.lookahead, LIMIT)
        more = max(0, (slots + self.size - 1) // self.size - len(table[0]))
        idle = [block for group in hits for block in group if not self.refs[block]] if new else []
        if (more or new) and (more + spare) * len(self.groups) + len(idle) > len(self.free):
            return None
        for block in idle:
            self.free.remove(block)
        if new:
            self.refs.update(block for group in hits for block in group)
            self.tables[name], self.offered[name] = table, len(table[0])
        gained = []
        for group in table:
            taken, self.free = self.free[:more], self.free[more:]
            self.cached = {key: block for key, block in self.cached.items() if block not in taken}
            self.refs.update(taken)
            group += taken
            gained.append(taken)
        return gained

    def cache(self, r: Request) -> None:
        name = r.request_id
        full = min(r.num_computed_tokens, r.num_tokens) // self.size
        for i in range(self.offered[name], full):
            for g in self.groups:
                self.cached.setdefault(self.key(r, i, g), self.tables[name][g][i])
        self.offered[name] = max(full, self.offered[name])

    def release(self, r: Request) -> None:
        for group in self.tables.pop(r.request_id, []):
            for block in reversed(group):
                self.refs[block] -= 1
                if not self.refs[block]:
                    self.free.insert(len(self.free) if block in self.cached.values() else 0, block)

    def reset(self) -> bool:
        if any(self.refs.values()):
            return False
        self.cached.clear()
        return True


def name_is_new(tables: dict, request: Request) -> bool:
    return request.request_id not in tables


class KVCacheMachine(RuleBasedStateMachine):
    """Random lives of requests with common prefixes; after each step both sides hold the very same blocks."""

    live: list[Request]

    @initialize(
        blocks=st.integers(2, 12) | st.integers(2, 64), size=st.integers(1, 4), groups=st.integers(1, 2),
        lookahead=st.integers(0, 3), caching=st.sampled_from([True, True, True, False]),
    )  # fmt: skip
    def start(self, blocks, size, groups, lookahead, caching):
        self.kv = KVCacheManager(
            make_layout(blocks, size, groups), enable_prefix_caching=caching, num_lookahead_slots=lookahead
        )
        self.model = NaiveCache(blocks, size, groups, lookahead)
        self.caching, self.live, self.away, self.count = caching, [], [], 0

    def admit(self, request: Request, spare: int) -> None:
        reads = self.caching and request.message.params is PLAIN
        expected_hits = self.model.hits(request) if reads else [[] for _ in self.model.groups]
        hits = self.kv.get_computed_blocks(request)
        assert [[b.block_id for b in group] for group in hits] == expected_hits
        assert len(hits[0]) * self.model.size < request.num_tokens
        num_hit_tokens = len(hits[0]) * self.model.size
        expected = self.model.allocate(request, request.num_tokens, expected_hits, spare)
        gained = self.kv.allocate_slots(request, request.num_tokens, computed=hits, num_spare=spare)
        assert (gained is None) == (expected is None)
        if gained is None:
            self.away.append(request)
        else:
            assert list(gained) == expected
            request.num_computed_tokens = num_hit_tokens
            self.live.append(request)

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=LIMIT - 2),
        salt=st.sampled_from([None, None, "s"]), params=st.sampled_from([PLAIN, PLAIN, WHOLE]),
        spare=st.sampled_from([0, 0, 1, 3]),
    )  # fmt: skip
    def arrive(self, tokens, salt, params, spare):
        self.count += 1
        self.admit(make_request(str(self.count), tokens, salt, params), spare)

    @precondition(lambda self: self.away)
    @rule(pick=st.integers(0, 9))
    def return_after_preemption(self, pick):
        self.admit(self.away.pop(pick % len(self.away)), 0)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9), chunk=st.integers(1, 6), token=st.integers(0, 1), drafts=st.integers(0, 3))
    def advance(self, pick, chunk, token, drafts):
        """Compute a chunk; at the end of the request verify drafts, all wrong, and append a token."""
        request = self.live[pick % len(self.live)]
        end = min(request.num_computed_tokens + chunk, request.num_tokens)
        at_end = end == request.num_tokens
        planned = min(end + drafts, LIMIT - 1) if at_end else end
        expected = self.model.allocate(request, planned, [], 0)
        gained = self.kv.allocate_slots(request, planned)
        assert gained == (expected if expected is None else tuple(expected) if any(expected) else ())
        if gained is None:
            return
        request.num_computed_tokens = planned  # drafts included: what is cached must not be
        self.kv.cache_blocks(request, request.num_computed_tokens)
        if self.caching:
            self.model.cache(request)
        request.num_computed_tokens = end
        if at_end and request.num_tokens < LIMIT - 1:
            request.append_output([token])

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9), preempt=st.booleans())
    def leave(self, pick, preempt):
        request = self.live.pop(pick % len(self.live))
        for _ in range(2):  # the second time there is nothing to free
            self.kv.free(request)
            self.model.release(request)
        if preempt:
            request.restart()
            self.away.append(request)

    @rule()
    def reset(self):
        assert self.kv.reset_prefix_cache() == self.model.reset()

    @invariant()
    def same_as_model(self):
        if not hasattr(self, "kv"):
            return
        self.kv.check(self.live)
        pool, model = self.kv.pool, self.model
        assert [block.block_id for block in pool.free_queue] == model.free
        assert {r.request_id: [list(g) for g in self.kv.get_block_ids(r)] for r in self.live} == model.tables
        assert {b.block_id for b in pool.blocks if b.block_hash} == set(model.cached.values())
        assert self.kv.usage == pytest.approx(1 - len(model.free) / (len(pool.blocks) - 1))


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(deadline=None, max_examples=120, stateful_step_count=40)


def compute(kv: KVCacheManager, request: Request) -> int:
    """Admit and compute all tokens of a request; returns the number of tokens that were cached."""
    hits = kv.get_computed_blocks(request)
    assert kv.allocate_slots(request, request.num_tokens, computed=hits) is not None
    request.num_computed_tokens = request.num_tokens
    kv.cache_blocks(request, request.num_computed_tokens)
    return len(hits[0]) * kv.block_size


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_full_hit_leaves_at_least_the_last_token(length, cached):
    kv = KVCacheManager(make_layout(10, 4))
    tokens = list(range(length))
    assert compute(kv, make_request("a", tokens)) == 0
    assert compute(kv, make_request("b", tokens)) == cached


@pytest.mark.parametrize(
    ("salt", "params", "cached"),
    [
        (None, PLAIN, 4),
        ("x", PLAIN, 0),
        (None, WHOLE, 0),
        (None, SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False), 0),
        (None, SamplingParams(skip_reading_prefix_cache=True), 0),
        (None, SamplingParams(skip_reading_prefix_cache=False), 4),
    ],
)
def test_who_reads_the_prefix_cache(salt, params, cached):
    kv = KVCacheManager(make_layout(10, 4))
    compute(kv, make_request("a", [1] * 6))
    assert compute(kv, make_request("b", [1] * 6, salt, params)) == cached


def test_hits_are_held_before_blocks_are_taken_so_they_cannot_evict_themselves():
    kv = KVCacheManager(make_layout(4, 2))
    old = make_request("old", [1, 2, 3, 4])
    compute(kv, old)
    kv.free(old)
    new = make_request("new", [1, 2, 3, 4, 5, 6])
    hits = kv.get_computed_blocks(new)
    hit_ids = [block.block_id for block in hits[0]]
    assert kv.allocate_slots(new, 6, computed=hits) is not None
    assert kv.get_block_ids(new)[0][:2] == hit_ids
    assert len(set(kv.get_block_ids(new)[0])) == 3


def test_idle_hits_count_against_the_pool():
    """Two blocks are free and both are hits: they are not also there to be allocated."""
    kv = KVCacheManager(make_layout(4, 2))
    old, other = make_request("old", [1, 2, 3, 4]), make_request("other", [9])
    compute(kv, old)
    compute(kv, other)
    kv.free(old)
    new = make_request("new", [1, 2, 3, 4, 5])
    hits = kv.get_computed_blocks(new)
    before = [b.block_id for b in kv.pool.free_queue]
    assert len(hits[0]) == 2
    assert kv.allocate_slots(new, 5, computed=hits) is None
    assert [b.block_id for b in kv.pool.free_queue] == before
    kv.check([other])


def test_the_end_of_a_chain_is_evicted_before_its_start():
    kv = KVCacheManager(make_layout(5, 2))
    old = make_request("old", [1, 2, 3, 4, 5, 6, 7])
    compute(kv, old)
    kv.free(old)
    compute(kv, make_request("taker", [9, 9, 9]))  # takes the unhashed last block and one cached block
    assert len(kv.get_computed_blocks(make_request("new", [1, 2, 3, 4, 5, 6, 7]))[0]) == 2


def test_lookahead_slots_are_kept_but_never_past_the_last_token():
    kv = KVCacheManager(make_layout(20, 4), num_lookahead_slots=6)
    request = make_request("a", [1] * 3)
    assert kv.allocate_slots(request, 3) == ([1, 2, 3],)
    assert kv.allocate_slots(request, LIMIT - 1) == ([4, 5, 6],)


def test_a_block_that_two_requests_computed_is_cached_once():
    kv = KVCacheManager(make_layout(8, 2))
    twins = [make_request(name, [1, 2, 3]) for name in "ab"]
    for twin in twins:  # both look before either has computed: no hits
        assert kv.allocate_slots(twin, 3, computed=kv.get_computed_blocks(twin)) is not None
    for twin in twins:
        twin.num_computed_tokens = 3
        kv.cache_blocks(twin, twin.num_computed_tokens)
    assert len(kv.pool.cached) == 1
    assert len(kv.get_computed_blocks(make_request("c", [1, 2, 3]))[0]) == 1
    kv.check(twins)


def test_groups_share_one_pool_and_hit_together_or_not_at_all():
    layout = make_layout(7, 2, groups=2)
    kv = KVCacheManager(layout)
    assert layout.max_tokens == 6
    request = make_request("a", [1, 2, 3, 4, 5])
    compute(kv, request)
    assert [len(group) for group in kv.get_block_ids(request)] == [3, 3]
    kv.free(request)
    again = make_request("b", [1, 2, 3, 4, 5])
    assert [len(group) for group in kv.get_computed_blocks(again)] == [2, 2]
    kv.pool.cached.remove(kv.pool.cached.get(request.block_hashes[1] + b"\x01\x00"))
    assert [len(group) for group in kv.get_computed_blocks(again)] == [1, 1]
