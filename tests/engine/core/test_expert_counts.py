"""Expert counts: what the router chose, whatever the steps, in this process and in the engine's own."""

from __future__ import annotations

import asyncio

import pytest
import torch

from nybble import LLM, AsyncLLM, EngineArgs, SamplingParams
from nybble.moe import Experts, Router
from nybble.plugins.errors import UsageError

LAYERS, EXPERTS, TOP_K = 2, 4, 2
PROMPTS = [[5, 6, 7], [20 + i for i in range(30)], [9]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
COMPUTED = sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in PROMPTS)  # the last token is never an input


@pytest.fixture(scope="module")
def mixtral(make_checkpoint):
    return make_checkpoint("Mixtral", num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)


def args(model, **settings):
    return EngineArgs(model=str(model), device="cpu", dtype="float32", num_gpu_blocks_override=64,
                      use_tqdm_on_load=False, **{"enable_prefix_caching": False, "expert_stats": True, **settings})


def modules(llm, kind):
    model = llm.llm_engine.client.core.executor.worker.loaded.model
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_counts_are_the_routers_choices_whatever_the_chunks(mixtral, budget):
    llm = LLM.from_engine_args(args(mixtral, max_num_batched_tokens=budget, max_num_seqs=min(budget, 3)))
    assert [layer.total for layer in llm.expert_counts()] == [0] * LAYERS, "warm-up is nobody's request"
    chosen = {router: [] for router in modules(llm, Router)}
    for router, seen in chosen.items():
        router.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[1].flatten()))
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    counted = llm.expert_counts()
    assert [layer.counts for layer in counted] == [
        torch.bincount(torch.cat(seen), minlength=EXPERTS).tolist() for seen in chosen.values()]
    assert [layer.layer for layer in counted] == [layer.name for layer in modules(llm, Experts)]
    assert sum(layer.total for layer in counted) == COMPUTED * TOP_K * LAYERS


def test_both_processes_count_the_same_and_reset(mixtral):
    found = []
    for engine_process in (False, True):
        llm = LLM.from_engine_args(args(mixtral), engine_process=engine_process)
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        first = llm.expert_counts()
        assert first == llm.expert_counts(reset=True), "to ask changes nothing"
        assert [layer.counts for layer in llm.expert_counts()] == [[0] * EXPERTS] * LAYERS
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.expert_counts() == first
        found.append(first)
        llm.shutdown()
    assert found[0] == found[1]


def test_asking_between_steps_loses_no_output(mixtral):
    llm = LLM.from_engine_args(args(mixtral), engine_process=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    engine, got, totals = llm.llm_engine, {}, []
    llm.expert_counts(reset=True)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, GREEDY)
    while engine.has_unfinished_requests():
        got |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        totals.append(llm.expert_counts()[0].total)
    assert [got[str(number)] for number in range(len(PROMPTS))] == expected
    assert totals == sorted(totals) and totals[-1] == COMPUTED * TOP_K
    llm.shutdown()


def test_the_asyncio_front_end(mixtral, llama):
    async def main():
        engine = AsyncLLM.from_engine_args(args(mixtral))
        await engine.start()
        streams = [engine.generate(prompt, GREEDY, str(number)) for number, prompt in enumerate(PROMPTS)]

        async def drain(stream):
            async for _ in stream:
                await engine.expert_counts()

        await asyncio.gather(*map(drain, streams))
        counted, reset = await engine.expert_counts(True), await engine.expert_counts()
        await engine.shutdown()
        off = AsyncLLM.from_engine_args(args(mixtral, expert_stats=False))
        with pytest.raises(UsageError, match="--expert-stats"):
            await off.expert_counts()
        return counted, reset

    counted, reset = asyncio.run(main())
    assert sum(layer.total for layer in counted) == COMPUTED * TOP_K * LAYERS
    assert not any(layer.total for layer in reset)


def test_off_by_default_there_is_nothing_to_pay(mixtral):
    assert EngineArgs().expert_stats is False
    llm = LLM.from_engine_args(args(mixtral, expert_stats=False))
    for layer in modules(llm, Experts):
        assert layer.counts is None and not any(t.dtype == torch.int64 for t in vars(layer).values()
                                                if isinstance(t, torch.Tensor))
    with pytest.raises(UsageError, match="--expert-stats"):
        llm.expert_counts()


@pytest.mark.parametrize("engine_process", [False, True])
def test_a_model_without_experts_says_so_and_goes_on(llama, engine_process):
    llm = LLM.from_engine_args(args(llama), engine_process=engine_process)
    with pytest.raises(UsageError, match="no experts"):
        llm.expert_counts()
    assert len(llm.generate([[5]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == GREEDY.max_tokens
    llm.shutdown()


def test_nobody_is_not_counted(mixtral):
    """Expert -1, which a token without an expert has, is no expert's count."""
    layer = modules(LLM.from_engine_args(args(mixtral)), Experts)[0]
    with torch.inference_mode():
        layer(torch.zeros(2, 64), torch.zeros(2, TOP_K), torch.tensor([[0, -1], [3, -1]]))
    assert layer.counts.tolist() == [1, 0, 0, 1]
