"""A core that runs a step ahead: what it says of itself in between, and what it lets go of."""

from __future__ import annotations

import gc
import weakref

import pytest

from nybble import LLM, SamplingParams
from nybble.engine.core.engine_core import EngineCore

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(llama):
    llm = LLM(str(llama), use_tqdm_on_load=False, num_gpu_blocks_override=50, dtype="float32", async_scheduling=True)
    yield llm
    llm.shutdown()


def core_of(llm: LLM) -> EngineCore:
    return llm.llm_engine.client.core


def test_a_step_in_flight_is_seen_before_it_ends(llm):
    """Else nobody would notice a device that hangs in it."""
    core = core_of(llm)
    llm.llm_engine.add_request("one", [5, 6, 7], GREEDY)
    assert core.step() == [] and core.has_work() and core.stats.num_running == 1
    first = core.stats.step
    tokens, prompt = 0, 0
    while core.has_work():
        tokens += sum(len(output.new_token_ids) for output in core.step())
        prompt += core.stats.prompt_tokens
        assert core.stats.step >= first
    assert (tokens, prompt) == (8, 3)


def test_penalties_see_every_token_first(llm):
    core = core_of(llm)
    llm.llm_engine.add_request("one", [5, 6, 7], GREEDY.replace(presence_penalty=0.5))
    core.step()
    assert not core.scheduler.can_run_ahead
    assert len(core.step()) == 1 and not core.scheduler._in_flight  # collected, and nothing launched beside


def test_shutdown_lets_go_of_a_step_in_flight(llama):
    llm = LLM(str(llama), use_tqdm_on_load=False, num_gpu_blocks_override=50, dtype="float32", async_scheduling=True)
    (plain,) = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    stop = GREEDY.replace(stop_token_ids=[plain.outputs[0].token_ids[3]])
    llm.generate([[5, 6, 7]], stop, use_tqdm=False)
    core = core_of(llm)
    assert core._running is not None, "the step after the last token was under way"
    runner = weakref.ref(core.executor.worker.runner)
    llm.shutdown()
    gc.collect()
    assert runner() is None
