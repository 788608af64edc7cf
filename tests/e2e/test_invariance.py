"""Whatever the engine does to run requests together, each one gets the tokens it would get alone."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager

import pytest
from safetensors.torch import load_file

from nybble import LLM, SamplingParams

RNG = random.Random(0)
SHARED = [RNG.randrange(5, 261) for _ in range(40)]
PROMPTS = (
    [[RNG.randrange(5, 261) for _ in range(RNG.choice([1, 2, 7, 15, 16, 17, 33, 70]))] for _ in range(14)]
    + [SHARED + [RNG.randrange(5, 261) for _ in range(n)] for n in (0, 1, 9)]
    + [SHARED[:32]]
)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = [
    SamplingParams(temperature=1.0, seed=i, max_tokens=8 + i, ignore_eos=True, logprobs=1,
                   **[{}, {"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.7},
                      {"min_p": 0.05}][i % 6])
    for i in range(len(PROMPTS))
]


MODELS = {
    "llama": ("Llama", {}),
    "mixtral": ("Mixtral", {"sliding_window": 24}),
    "deepseek": ("DeepseekV2", dict(
        num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=32,
        first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=4, topk_group=2)),
}


@contextmanager
def engine(model, **settings):
    llm = LLM(str(model), use_tqdm_on_load=False, **({"num_gpu_blocks_override": 200, "dtype": "float32"} | settings))
    try:
        yield llm
    finally:
        llm.shutdown()


def tokens(outputs):
    return [[c.token_ids for c in o.outputs] for o in outputs]


def run(llm, params):
    return tokens(llm.generate(PROMPTS, params, use_tqdm=False))


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_checkpoint):
    arch, settings = MODELS[request.param]
    return make_checkpoint(arch, **settings)


@pytest.fixture(scope="module", params=["greedy", "seeded"])
def params(request):
    return GREEDY if request.param == "greedy" else SEEDED


@pytest.fixture(scope="module")
def alone(model, params):
    """Each prompt by itself, on an engine without prefix cache whose steps hold any prompt whole."""
    with engine(model, enable_prefix_caching=False) as llm:
        each = params if isinstance(params, list) else [params] * len(PROMPTS)
        return [tokens(llm.generate([p], s, use_tqdm=False))[0] for p, s in zip(PROMPTS, each)]


SETTINGS = {
    "batched": {},
    "small blocks": {"block_size": 4, "num_gpu_blocks_override": 400},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "chunks of 3": {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 3},
    "three at a time": {"max_num_seqs": 3},
    "priority": {"scheduling_policy": "priority"},
    "no chunks": {"enable_chunked_prefill": False, "max_num_batched_tokens": 260},
    "pool too small for all": {"num_gpu_blocks_override": 16},
    "pool for barely one": {"num_gpu_blocks_override": 8, "max_model_len": 112},
    "own process": {"engine_process": True},
    "a step ahead": {"async_scheduling": True},
    "a step ahead, in chunks": {"async_scheduling": True, "max_num_batched_tokens": 16, "max_num_seqs": 12},
    "a step ahead, pool too small": {"async_scheduling": True, "num_gpu_blocks_override": 16},
    "a step ahead, own process": {"async_scheduling": True, "engine_process": True},
}


@pytest.fixture(scope="module")
def engine_of(model):
    """engine_of(case) -> an engine of a model, made once for all parameters; its prefix cache is empty."""
    made: dict[str, LLM] = {}
    with ExitStack() as stack:
        def get(case):
            if case not in made:
                made[case] = stack.enter_context(engine(model, **SETTINGS[case]))
            assert made[case].reset_prefix_cache()
            return made[case]

        yield get


@pytest.mark.parametrize("case", SETTINGS)
def test_together_is_alone(case, params, alone, engine_of):
    assert run(engine_of(case), params) == alone


def test_cached_is_cold(model, params, alone):
    with engine(model) as llm:
        first = llm.generate(PROMPTS, params, use_tqdm=False)
        second = llm.generate(PROMPTS, params, use_tqdm=False)
        assert tokens(first) == tokens(second) == alone
        cached = {len(o.prompt_token_ids): o.num_cached_tokens for o in second}
        assert all(hit == (length - 1) // 16 * 16 for length, hit in cached.items())
        assert llm.reset_prefix_cache()
        assert all(o.num_cached_tokens == 0 for o in llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False))


@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_is_not(model, params, alone, monkeypatch, prefix_cache, ahead):
    monkeypatch.setenv("NYBBLE_TEST_FORCE_PREEMPT", "0.5")
    monkeypatch.setenv("NYBBLE_STRICT_KV", "1")
    with engine(model, enable_prefix_caching=prefix_cache, max_num_batched_tokens=48, max_num_seqs=8,
                async_scheduling=ahead) as llm:
        preempted, how = 0, "launch" if ahead else "execute_model"
        add = getattr(llm.llm_engine.client.core.executor, how)

        def counting(plan):
            nonlocal preempted
            preempted += llm.llm_engine.client.core.scheduler.stats.num_preempted
            return add(plan)

        monkeypatch.setattr(llm.llm_engine.client.core.executor, how, counting)
        assert run(llm, params) == alone
        assert preempted > 10


def test_greedy_is_transformers(model, transformers_greedy):
    with engine(model) as llm:
        assert run(llm, GREEDY) == [[ids] for ids in transformers_greedy(model, PROMPTS, 20)]


@pytest.mark.parametrize("name", ["llama-bf16", "qwen2-bf16", "dsv2-bf16", "dsv2lite-bf16"])
def test_greedy_is_the_oracle(name, shared_fixtures):
    oracle = load_file(shared_fixtures / name / "oracle" / "oracle.safetensors")
    prompts = [oracle[f"input_ids_{i}"].flatten().tolist() for i in range(3)]
    with engine(shared_fixtures / name) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
        assert tokens(outputs) == [[oracle[f"greedy_{i}"].flatten().tolist()] for i in range(3)]


def test_a_seed_fixes_tokens_and_its_absence_varies_them(llama):
    hot = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    with engine(llama) as llm:
        fixed = tokens(llm.generate([PROMPTS[0]] * 2, hot.replace(seed=7), use_tqdm=False))
        free = tokens(llm.generate([PROMPTS[0]] * 2, hot, use_tqdm=False))
        (many,) = tokens(llm.generate([PROMPTS[0]], hot.replace(seed=7, n=3), use_tqdm=False))
    assert fixed[0] == fixed[1] and free[0] != free[1]
    assert many[0] == fixed[0][0] and len({tuple(t) for t in many}) == 3
