"""The scheduler's named rules, one test each; test_simulation.py covers how they meet."""

from __future__ import annotations

import logging

import pytest

from nybble.engine.config import CacheConfig, SchedulerConfig
from nybble.engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec, Plan, Result
from nybble.engine.request import EngineCoreOutput, EngineCoreRequest, SamplingParams, TokenLogprobLists
from nybble.engine.sched.scheduler import Scheduler
from nybble.plugins.errors import RequestError

SPEC = KVCacheSpec(shape=(2, 1, 8), dtype_bytes=4)
EOS, STOP = 100, 101


class Rig:
    """A scheduler with blocks of 4 tokens, and a worker that samples 7, 8, 9, ... by position."""

    def __init__(self, *, blocks: int = 100, max_model_len: int = 1000, caching: bool = True, **config) -> None:
        scheduler_args = {key: config.pop(key) for key in ("force_preempt", "log_steps") if key in config}
        self.scheduler = Scheduler(
            scheduler=SchedulerConfig(**config), cache=CacheConfig(enable_prefix_caching=caching),
            max_model_len=max_model_len, strict_kv=True, **scheduler_args,
            layout=KVCacheLayout(
                num_blocks=blocks + 1, block_size=4, groups=[KVCacheGroup(layers=[0], spec=SPEC)]
            ),
        )  # fmt: skip

    def add(self, name: str, prompt: int | list[int] = 4, *, max_tokens: int = 50, **fields) -> None:
        """Queue a request; a prompt given by its length shares no prefix with other names."""
        tokens = [ord(name[0])] * prompt if isinstance(prompt, int) else prompt
        params = fields.pop("params", SamplingParams())
        self.scheduler.add_request(
            EngineCoreRequest(
                request_id=name,
                prompt_token_ids=tokens,
                params=params,
                seed=0,
                max_tokens=max_tokens,
                **fields,
            )
        )

    def answer(self, plan: Plan, **sampled: list[int]) -> Result:
        """What a worker would answer: one token for each request that reached its end, or those given."""
        requests = self.scheduler.requests
        ended = [i for i, n, c in zip(plan.request_ids, plan.num_tokens, plan.num_computed)
                 if i in requests and n + c >= requests[i].num_tokens]  # fmt: skip
        return Result(sampled={i: sampled.get(i, [1000 + requests[i].num_tokens]) for i in ended})

    def step(self, **sampled: list[int]) -> tuple[dict[str, int], dict[str, EngineCoreOutput]]:
        """Run a step: {request id: tokens planned}, {request id: output}."""
        plan = self.scheduler.schedule()
        outputs = self.scheduler.update(plan, self.answer(plan, **sampled))
        return dict(zip(plan.request_ids, plan.num_tokens)), {output.request_id: output for output in outputs}

    def status(self, name: str) -> str:
        return self.scheduler.requests[name].status.name


# -- admission


@pytest.mark.parametrize(
    ("config", "prompt", "code", "numbers"),
    [
        ({"max_model_len": 8}, 8, "context_length_exceeded", ("8 prompt", "at most 8")),
        ({"blocks": 2}, 8, "context_length_exceeded", ("8 prompt", "at most 8", "KV cache")),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 6},
            7,
            "context_length_exceeded",
            ("7", "6"),
        ),
        ({"max_queue": 1}, 4, "engine_overloaded", ("1 waiting", "max_queue 1")),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason_and_a_way_out(config, prompt, code, numbers):
    rig = Rig(**config)
    rig.add("first", 4)
    with pytest.raises(RequestError) as refusal:
        rig.add("second", prompt)
    assert refusal.value.code == code
    assert all(number in str(refusal.value) for number in (*numbers, "fix:"))
    assert list(rig.scheduler.requests) == ["first"]


def test_the_longest_prompt_that_fits_runs_alone_and_gets_its_one_token():
    rig = Rig(blocks=2, max_model_len=8)
    rig.add("a", 7, max_tokens=50)
    _, outputs = rig.step()
    assert (len(outputs["a"].new_token_ids), outputs["a"].finish_reason) == (1, "length")


def test_an_id_is_refused_while_it_lives_and_free_afterwards():
    rig = Rig()
    rig.add("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        rig.add("a")
    rig.scheduler.finish_requests(["a"])
    rig.add("a")


@pytest.mark.parametrize(("limits", "total"), [({"max_model_len": 10}, 10), ({"blocks": 3}, 12), ({}, 54)])
def test_output_ends_where_model_pool_or_max_tokens_ends(limits, total):
    rig = Rig(**limits)
    rig.add("a", 4, max_tokens=50)
    tokens = 0
    while rig.scheduler.has_unfinished():
        _, outputs = rig.step()
        tokens += len(outputs["a"].new_token_ids)
    assert (4 + tokens, outputs["a"].finish_reason) == (total, "length")


# -- one budget, no phases


def test_running_requests_come_first_and_newcomers_share_the_rest():
    rig = Rig(max_num_batched_tokens=10)
    rig.add("a", 4)
    rig.add("b", 9)
    rig.add("c", 4)
    assert rig.step()[0] == {"a": 4, "b": 6}
    assert rig.step()[0] == {"a": 1, "b": 3, "c": 4}
    assert rig.step()[0] == {"a": 1, "b": 1, "c": 1}


def test_a_chunk_that_does_not_reach_the_end_has_no_token():
    rig = Rig(max_num_batched_tokens=3)
    rig.add("a", 4)
    assert rig.step() == ({"a": 3}, {})
    planned, outputs = rig.step()
    assert planned == {"a": 1}
    assert outputs["a"].new_token_ids == [1004]


@pytest.mark.parametrize(("prompt", "sampled"), [(6, {"a": [1]}), (4, {}), (4, {"a": []}), (4, {"a": [1, 2]})])
def test_a_result_that_does_not_match_its_plan_is_a_bug(prompt, sampled):
    rig = Rig(max_num_batched_tokens=4)
    rig.add("a", prompt)
    plan = rig.scheduler.schedule()
    with pytest.raises(AssertionError, match="sampled"):
        rig.scheduler.update(plan, Result(sampled=sampled))


def test_long_prefill_token_threshold_caps_one_request():
    rig = Rig(max_num_batched_tokens=10, long_prefill_token_threshold=4)
    rig.add("a", 9)
    rig.add("b", 3)
    assert [rig.step()[0] for _ in range(3)] == [{"a": 4, "b": 3}, {"a": 4, "b": 1}, {"a": 1, "b": 1}]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_takes_it_whole():
    rig = Rig(enable_chunked_prefill=False, max_num_batched_tokens=6, long_prefill_token_threshold=2)
    rig.add("a", 4, max_tokens=2)
    rig.add("b", 6)
    rig.add("c", 1)  # would fit, but it came after b
    assert [rig.step()[0] for _ in range(3)] == [{"a": 4}, {"a": 1}, {"b": 6}]


def test_without_chunked_prefill_a_resumed_request_may_exceed_the_budget():
    rig = Rig(enable_chunked_prefill=False, max_num_batched_tokens=6, caching=False, force_preempt=1.0)
    rig.add("a", 3, max_tokens=20)
    rig.add("b", 3, max_tokens=20)
    outputs = 0
    for _ in range(200):
        outputs += sum(len(o.new_token_ids) for o in rig.step()[1].values())
    assert not rig.scheduler.has_unfinished()
    assert outputs == 40


def test_max_num_seqs_bounds_the_running():
    rig = Rig(max_num_seqs=2)
    for name in "abc":
        rig.add(name)
    assert list(rig.step()[0]) == ["a", "b"]
    rig.scheduler.finish_requests(["a"])
    assert list(rig.step()[0]) == ["b", "c"]


def test_a_decoding_request_is_planned_as_columns_only():
    rig = Rig()
    rig.add("a", 6)
    rig.step()
    plan = rig.scheduler.schedule()
    assert plan == Plan(step=2, request_ids=["a"], num_tokens=[1], num_computed=[6])


def test_workers_hear_of_new_requests_blocks_and_ends():
    rig = Rig()
    rig.add("a", 7, max_tokens=3, stop_token_ids=[STOP], bad_words_token_ids=[[5]], eos_token_ids=[EOS])
    plans = []
    while rig.scheduler.has_work():
        plans.append(rig.scheduler.schedule())
        rig.scheduler.update(plans[-1], rig.answer(plans[-1]))
    [new] = plans[0].new_requests
    assert (new.token_ids, new.num_prompt_tokens, new.num_computed_tokens) == ([97] * 7, 7, 0)
    assert (new.block_ids, new.stop_token_ids, new.bad_words_token_ids) == (([1, 2],), [EOS, STOP], [[5]])
    assert [plan.new_block_ids for plan in plans] == [{}, {}, {"a": ([3],)}, {}]
    assert [plan.finished_request_ids for plan in plans] == [[], [], [], ["a"]]


# -- too few blocks


def crowd(**config) -> Rig:
    """Two requests of two blocks each, that fill a pool of four; both need a third block in the next step."""
    rig = Rig(blocks=4, max_num_batched_tokens=64, **config)
    rig.add("a", 4, arrival_time=1.0, priority=config.get("scheduling_policy") == "priority")
    rig.add("b", 4, arrival_time=2.0)
    for _ in range(5):
        rig.step()
    assert rig.scheduler.kv.usage == 1.0
    return rig


@pytest.mark.parametrize(("policy", "victim", "survivor"), [("fcfs", "b", "a"), ("priority", "a", "b")])
def test_the_least_urgent_request_makes_room_and_nobody_is_admitted(policy, victim, survivor):
    rig = crowd(scheduling_policy=policy)
    rig.add("c", 1)
    plan = rig.scheduler.schedule()
    assert (plan.request_ids, plan.num_tokens, plan.total_tokens) == ([survivor], [1], 1)
    assert (plan.finished_request_ids, plan.new_requests) == ([victim], [])
    assert rig.status(victim) == "PREEMPTED"
    assert rig.scheduler.stats.num_preempted == 1
    rig.scheduler.update(plan, rig.answer(plan))
    assert [r.request_id for r in rig.scheduler.waiting] == (["b", "c"] if policy == "fcfs" else ["c", "a"])


def test_a_resumed_request_computes_its_outputs_again_but_does_not_sample_them_again():
    rig = crowd(caching=False)
    outputs = [1004, 1005, 1006, 1007, 1008]
    rig.step()
    assert rig.scheduler.requests["b"].all_token_ids == [98] * 4 + outputs
    rig.scheduler.finish_requests(["a"])
    rig.scheduler.config = SchedulerConfig(max_num_batched_tokens=5)
    plan = rig.scheduler.schedule()
    [new] = plan.new_requests
    assert (new.token_ids, new.num_prompt_tokens, new.num_computed_tokens) == ([98] * 4 + outputs, 4, 0)
    assert (plan.num_tokens, rig.scheduler.stats.prompt_tokens) == ([5], 4)
    assert rig.scheduler.update(plan, rig.answer(plan)) == []
    _, gained = rig.step()
    assert gained["b"].new_token_ids == [1009]
    assert (gained["b"].num_preemptions, gained["b"].num_cached_tokens) == (1, 0)


def test_a_preempted_request_finds_its_own_blocks_again():
    rig = crowd()
    rig.step()
    rig.scheduler.finish_requests(["a"])
    plan = rig.scheduler.schedule()
    assert plan.new_requests[0].num_computed_tokens == 4  # a's growth took the end of the chain, not its start
    [output] = rig.scheduler.update(plan, rig.answer(plan))
    assert output.num_cached_tokens == 0  # what the first admission saved, not the resumption


def test_prompt_tokens_that_are_computed_again_are_counted_without_hits_and_outputs():
    rig = Rig(force_preempt=1.0)
    rig.add("z", 1)
    rig.add("a", 6)
    steps = [(rig.step()[0], rig.scheduler.stats.prompt_tokens) for _ in range(3)]
    assert steps == [({"z": 1, "a": 6}, 7), ({"z": 1}, 0), ({"z": 1, "a": 3}, 2)]  # of 7 tokens 4 are cached


def test_one_request_alone_may_use_the_whole_pool():
    rig = Rig(blocks=3, num_lookahead_slots=8)
    rig.add("a", 4)
    while rig.scheduler.has_unfinished():
        planned, outputs = rig.step()
        assert planned
    assert rig.scheduler.stats.num_preempted == 0
    assert outputs["a"].finish_reason == "length"


def test_a_newcomer_leaves_one_block_to_each_running_request():
    rig = Rig(blocks=4)
    rig.add("a", 4)
    rig.add("b", 8)
    rig.add("c", 4)
    assert list(rig.step()[0]) == ["a", "b"]
    rig = Rig(blocks=3)
    rig.add("a", 4)
    rig.add("b", 8)
    assert list(rig.step()[0]) == ["a"]


def test_a_prompt_in_chunks_holds_all_its_blocks_from_the_start():
    rig = Rig(blocks=10, max_num_batched_tokens=4)
    rig.add("a", 20)
    rig.step()
    assert rig.scheduler.kv.pool.num_free_blocks == 5


def test_forced_preemption_spares_the_first_and_changes_no_output():
    rig = Rig(force_preempt=1.0)
    for name in "abc":
        rig.add(name, 4, max_tokens=10)
    seen: dict[str, list[int]] = {name: [] for name in "abc"}
    preempted = 0
    while rig.scheduler.has_unfinished():
        first = rig.scheduler.running[:1]
        planned, outputs = rig.step()
        preempted += rig.scheduler.stats.num_preempted
        assert all(request.request_id in planned for request in first)
        for name, output in outputs.items():
            seen[name] += output.new_token_ids
    assert preempted > 5
    assert all(tokens == list(range(1004, 1014)) for tokens in seen.values())


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.2, 40, 120), (1.0, 250, 300)])
def test_forced_preemption_happens_with_its_probability(probability, low, high):
    rig = Rig(force_preempt=probability, blocks=1000)
    for name in "abc":
        rig.add(name, 4, max_tokens=900)
    preempted = 0
    for _ in range(400):
        rig.step()
        preempted += rig.scheduler.stats.num_preempted
    assert low <= preempted <= high


# -- order


def test_priority_decides_who_is_admitted_and_who_computes_first():
    rig = Rig(scheduling_policy="priority", max_num_batched_tokens=5)
    rig.add("low", 4, priority=2, arrival_time=1.0)
    rig.add("late", 4, priority=1, arrival_time=3.0)
    rig.add("early", 4, priority=1, arrival_time=2.0)
    assert rig.step()[0] == {"early": 4, "late": 1}
    rig.add("urgent", 4, priority=0, arrival_time=4.0)
    assert rig.step()[0] == {"early": 1, "late": 3, "urgent": 1}
    assert rig.step()[0] == {"urgent": 3, "early": 1, "late": 1}


# -- the prefix cache


def test_a_prefix_is_shared_from_the_step_after_the_one_that_computed_it():
    rig = Rig()
    rig.add("a", [1] * 9)
    rig.add("b", [1] * 9)
    assert rig.step()[0] == {"a": 9, "b": 9}
    rig.add("c", [1] * 9)
    planned, outputs = rig.step()
    assert planned["c"] == 1
    assert outputs["c"].num_cached_tokens == 8
    assert (rig.scheduler.stats.prefix_queries, rig.scheduler.stats.prefix_hits) == (9, 8)


@pytest.mark.parametrize(
    ("caching", "params"), [(False, SamplingParams()), (True, SamplingParams(skip_reading_prefix_cache=True))]
)
def test_who_does_not_read_the_prefix_cache_is_not_counted(caching, params):
    rig = Rig(caching=caching)
    rig.add("a", [1] * 9)
    rig.step()
    rig.add("b", [1] * 9, params=params)
    planned, outputs = rig.step()
    assert (planned["b"], outputs["b"].num_cached_tokens) == (9, 0)
    assert (rig.scheduler.stats.prefix_queries, rig.scheduler.stats.prefix_hits) == (0, 0)


def test_the_chunks_of_a_prompt_are_shared_before_all_of_it_is_computed():
    rig = Rig(long_prefill_token_threshold=4)
    rig.add("a", [1] * 9)
    rig.step()
    rig.add("b", [1] * 9)
    assert rig.step()[1] == {}
    assert rig.scheduler.stats.prefix_hits == 4


def test_a_prefix_whose_step_is_still_in_flight_is_not_shared():
    rig = Rig(max_num_batched_tokens=9)
    rig.add("a", [1] * 9)
    plan = rig.scheduler.schedule()
    rig.scheduler.finish_requests(["a"])
    rig.scheduler.update(plan, Result(sampled={"a": [5]}))
    rig.add("b", [1] * 9)
    assert rig.step()[0] == {"b": 9}


def test_generated_tokens_are_shared_and_rejected_drafts_are_not():
    rig = Rig()
    rig.add("a", [1, 2, 3])
    plan = rig.scheduler.schedule()
    rig.scheduler.update(plan, Result(sampled={"a": [4]}, draft_token_ids={"a": [5, 6, 7]}))
    plan = rig.scheduler.schedule()
    assert (plan.num_tokens, plan.draft_token_ids) == ([4], {"a": [5, 6, 7]})
    rig.scheduler.update(plan, Result(sampled={"a": [5, 9]}))  # 5 was right, 6 was not
    assert rig.scheduler.requests["a"].num_computed_tokens == 5
    rig.add("b", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert rig.step()[0] == {"a": 1, "b": 5}


def test_reset_prefix_cache_needs_an_idle_engine():
    rig = Rig()
    rig.add("a", [1] * 9, max_tokens=2)
    rig.step()
    assert not rig.scheduler.reset_prefix_cache()
    rig.step()
    assert rig.scheduler.reset_prefix_cache()
    rig.add("b", [1] * 9)
    assert rig.step()[0] == {"b": 9}


# -- drafts


def test_drafts_are_cut_to_the_budget_and_to_the_last_position():
    rig = Rig(max_num_batched_tokens=8)
    rig.add("a", 4, max_tokens=4)
    rig.add("b", 4)
    plan = rig.scheduler.schedule()
    drafts = {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8, 9, 9]}
    rig.scheduler.update(plan, Result(sampled={"a": [0], "b": [0]}, draft_token_ids=drafts))
    plan = rig.scheduler.schedule()
    assert plan.num_tokens == [3, 5]
    assert plan.draft_token_ids == {"a": [1, 2], "b": [5, 6, 7, 8]}
    outputs = rig.scheduler.update(plan, Result(sampled={"a": [1, 2, 3], "b": [5]}))
    assert [(o.new_token_ids, o.finish_reason) for o in outputs] == [([1, 2, 3], "length"), ([5], None)]
    assert rig.scheduler.requests["b"].num_computed_tokens == 5
    assert rig.scheduler.schedule().draft_token_ids == {}


def test_drafts_wait_with_a_request_that_gets_no_budget_and_die_with_preemption():
    rig = Rig(max_num_batched_tokens=8, max_num_seqs=2)
    rig.add("a", 4)
    rig.add("b", 4)
    plan = rig.scheduler.schedule()
    drafts = {"a": [1] * 7, "b": [2]}
    rig.scheduler.update(plan, Result(sampled={"a": [0], "b": [0]}, draft_token_ids=drafts))
    plan = rig.scheduler.schedule()
    assert plan.request_ids == ["a"]
    rig.scheduler.update(plan, Result(sampled={"a": [3]}))
    assert rig.scheduler.requests["b"].spec_token_ids == [2]
    rig.scheduler.requests["b"].restart()
    assert rig.scheduler.requests["b"].spec_token_ids == []


# -- how requests end


@pytest.mark.parametrize(
    ("fields", "params", "sampled", "kept", "reason", "stop_reason"),
    [
        ({}, {}, [EOS, 5], [EOS], "stop", None),
        ({}, {}, [5, EOS], [5, EOS], "stop", None),
        ({}, {}, [5, STOP, 6], [5, STOP], "stop", STOP),
        ({}, {"ignore_eos": True}, [EOS, 5, 6], [EOS, 5, 6], None, None),
        ({"stop_token_ids": [EOS]}, {}, [EOS], [EOS], "stop", None),
        ({"stop_token_ids": [EOS]}, {"ignore_eos": True}, [EOS], [EOS], "stop", EOS),
        ({}, {"min_tokens": 3}, [EOS, STOP, EOS], [EOS, STOP, EOS], "stop", None),
        ({}, {"min_tokens": 4}, [5, EOS, STOP], [5, EOS, STOP], None, None),
        ({"max_tokens": 2}, {}, [5, 6, EOS], [5, 6], "length", None),
        ({"max_tokens": 2}, {}, [5, EOS, 6], [5, EOS], "stop", None),
        ({"max_tokens": 2}, {"min_tokens": 9}, [EOS, 5, 6], [EOS, 5], "length", None),
    ],
)
def test_stop_rules_in_order_within_a_run_of_accepted_drafts(fields, params, sampled, kept, reason, stop_reason):
    rig = Rig()
    fields = {"eos_token_ids": [EOS], "stop_token_ids": [STOP], "max_tokens": 50, **fields}
    rig.add("a", 4, params=SamplingParams(**params), **fields)
    plan = rig.scheduler.schedule()
    plan.draft_token_ids["a"] = sampled[:-1]  # as if these had been drafts and all right
    rows = TokenLogprobLists([[t] for t in sampled], [[-1.0] for _ in sampled], [1 for _ in sampled])
    [output] = rig.scheduler.update(plan, Result(sampled={"a": sampled}, logprobs={"a": rows}))
    assert (output.new_token_ids, output.finish_reason, output.stop_reason) == (kept, reason, stop_reason)
    assert output.logprobs.token_ids == [[t] for t in kept]
    assert len(output.logprobs.logprobs) == len(output.logprobs.ranks) == len(kept)
    assert rig.scheduler.has_unfinished() == (reason is None)


def test_an_error_ends_one_request_and_frees_its_blocks():
    rig = Rig()
    rig.add("a", 4)
    rig.add("b", 4)
    plan = rig.scheduler.schedule()
    outputs = rig.scheduler.update(plan, Result(sampled={"b": [5]}, errors={"a": "NaN"}))
    assert [(o.request_id, o.new_token_ids, o.finish_reason, o.error) for o in outputs] == [
        ("a", [], "error", "NaN"),
        ("b", [5], None, None),
    ]
    assert rig.scheduler.kv.pool.num_free_blocks == 99
    assert len(rig.scheduler.kv.pool.cached) == 1  # b's block; a's is not to be trusted
    assert rig.scheduler.schedule().finished_request_ids == ["a"]


def test_an_abort_in_flight_frees_at_once_and_drops_the_result():
    rig = Rig()
    rig.add("a", 4)
    rig.add("b", 4)
    plan = rig.scheduler.schedule()
    result = rig.answer(plan)
    rig.scheduler.finish_requests(iter(["a", "a", "nobody"]))
    assert rig.scheduler.kv.pool.num_free_blocks == 99
    rig.add("a", 2)  # the id is free again; the old result must not reach the new request
    assert [o.request_id for o in rig.scheduler.update(plan, result)] == ["b"]
    plan = rig.scheduler.schedule()
    assert plan.finished_request_ids == ["a"]
    assert dict(zip(plan.request_ids, plan.num_tokens)) == {"b": 1, "a": 2}


def test_an_abort_with_the_last_token_in_flight_is_harmless():
    rig = Rig()
    rig.add("a", 4, max_tokens=1)
    plan = rig.scheduler.schedule()
    assert len(rig.scheduler.update(plan, rig.answer(plan))) == 1
    rig.scheduler.finish_requests(["a"])
    assert rig.scheduler.has_work()
    assert not rig.scheduler.has_unfinished()
    assert rig.scheduler.schedule().finished_request_ids == ["a"]
    assert not rig.scheduler.has_work()


def test_workers_are_told_once_of_an_end_and_never_of_requests_they_do_not_hold():
    rig = crowd()
    rig.add("c", 1)
    rig.scheduler.finish_requests(["c"])  # never ran
    plan = rig.scheduler.schedule()
    assert plan.finished_request_ids == ["b"]  # preempted
    rig.scheduler.finish_requests(["b"])
    rig.scheduler.update(plan, rig.answer(plan))
    rig.scheduler.finish_requests(["a"])
    assert rig.scheduler.schedule().finished_request_ids == ["a"]
    assert not rig.scheduler.has_work()


@pytest.mark.parametrize("preempted_at", [None, 2, 3, 4])
def test_prompt_logprobs_are_collected_over_chunks_and_reported_once(preempted_at):
    """The prompt takes steps 1 to 3; when it is preempted, some of its rows come twice."""
    rig = Rig(max_num_batched_tokens=4)
    rig.add("z", 1)
    rig.add("a", [1, 2, 3, 4, 5, 6, 7, 8], params=SamplingParams(prompt_logprobs=0))
    reports = []
    for number in range(1, 9):
        rig.scheduler._force_preempt = 1.0 if number == preempted_at else 0.0
        plan = rig.scheduler.schedule()
        result = rig.answer(plan)
        for request_id, count, start in zip(plan.request_ids, plan.num_tokens, plan.num_computed):
            if request_id == "a" and (rows := [[token] for token in range(2, 9)][start : start + count]):
                result.prompt_logprobs["a"] = TokenLogprobLists(rows, [[-1.0]] * len(rows), [1] * len(rows))
        reports += [o.prompt_logprobs for o in rig.scheduler.update(plan, result) if o.request_id == "a"]
    [first, *later] = reports
    assert first.token_ids == [[2], [3], [4], [5], [6], [7], [8]]
    assert len(first.logprobs) == len(first.ranks) == 7
    assert later
    assert set(later) == {None}


# -- what can be seen from outside


def test_stats_of_a_step():
    times = iter([10.0, 11.0, 12.0, 13.0, 20.0, 20.5])
    rig = Rig(max_num_batched_tokens=6, max_num_seqs=2)
    rig.scheduler._clock = lambda: next(times)
    rig.add("a", 4)
    rig.add("b", 4)
    rig.add("c", 4)
    _, outputs = rig.step()
    stats = rig.scheduler.stats
    assert (stats.step, stats.num_running, stats.num_waiting) == (1, 2, 1)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.prefix_queries, stats.prefix_hits) == (
        6,
        1,
        8,
        0,
    )
    assert (stats.kv_usage, stats.schedule_seconds) == (pytest.approx(0.02), 3.0)
    assert outputs["a"].first_scheduled_time == 11.0
    _, outputs = rig.step()
    assert (rig.scheduler.stats.prompt_tokens, rig.scheduler.stats.generated_tokens) == (2, 2)
    assert outputs["b"].first_scheduled_time == 12.0
    assert rig.scheduler.stats.schedule_seconds == 0.5


def test_one_log_line_per_step(caplog):
    rig = Rig(log_steps=True)
    rig.add("a", 6)
    with caplog.at_level(logging.INFO):
        rig.step()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 1: 1 running, 0 waiting, 6 new + 0 cached tokens, 0 preempted, KV 2.0%, ")


def test_a_dump_fits_one_screen_and_shows_no_text():
    rig = Rig(max_num_seqs=30)
    for i in range(60):
        rig.add(f"r{i}", [424242])
    rig.step()
    dump = rig.scheduler.dump()
    assert len(dump.splitlines()) == 1 + 2 * 21
    assert "30 running, 30 waiting" in dump
    assert "and 10 more waiting" in dump
    assert "424242" not in dump


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.running.reverse(),
        lambda s: s.running.pop(),
        lambda s: s.waiting.pop(),
        lambda s: s.requests.pop("b"),
        lambda s: s.waiting.add(s.running[0]),
        lambda s: s.kv.free(s.running[0]),
        lambda s: setattr(s.running[0], "num_computed_tokens", 9),
        lambda s: setattr(s.running[0], "num_computed_tokens", 3),
        lambda s: s.kv.pool.touch(s.kv.pool.blocks[1:2]),
    ],
)
def test_strict_kv_sees_damage(damage):
    rig = Rig(max_num_seqs=2)
    for name in "abc":
        rig.add(name)
    rig.step()
    rig.scheduler.check()
    damage(rig.scheduler)
    with pytest.raises(AssertionError):
        rig.scheduler.check()


def test_strict_kv_checks_after_each_step():
    rig = Rig()
    rig.add("a")
    plan = rig.scheduler.schedule()
    rig.scheduler.kv.pool.touch(rig.scheduler.kv.pool.blocks[1:2])
    with pytest.raises(AssertionError, match="has 1 holders"):
        rig.scheduler.update(plan, rig.answer(plan))
