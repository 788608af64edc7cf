"""The same code on a CUDA device gives the CPU's tokens."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from nybble import LLM, SamplingParams

pytestmark = pytest.mark.gpu

RNG = random.Random(1)
PROMPTS = [[RNG.randrange(5, 261) for _ in range(n)] for n in (1, 3, 16, 17, 40, 64, 65, 120)]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)


def run(model, params=GREEDY, **settings):
    torch.backends.cuda.matmul.allow_tf32 = False
    llm = LLM(str(model), use_tqdm_on_load=False, **settings)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    layout = llm.llm_engine.client.layout
    llm.shutdown()
    return [o.outputs[0] for o in outputs], layout


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("arch, settings", [
    ("Llama", {}), ("Mistral", {"sliding_window": 13}), ("Qwen2", {"tie_word_embeddings": True}),
    ("DeepseekV2", dict(num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
                        v_head_dim=24, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32))])
def test_cuda_gives_the_cpus_greedy_ids(arch, settings, backend, make_checkpoint):
    model = make_checkpoint(arch, **settings)
    cpu, _ = run(model, device="cpu", dtype="float32", num_gpu_blocks_override=100)
    cuda, _ = run(model, device="cuda", dtype="float32", num_gpu_blocks_override=100, max_num_batched_tokens=64,
                  attention_backend=backend)
    assert [o.token_ids for o in cuda] == [o.token_ids for o in cpu]
    for a, b in zip(cpu, cuda):
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)


def test_seeded_sampling_is_the_cpus(llama):
    params = [SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=i, max_tokens=24, ignore_eos=True,
                             repetition_penalty=1.1) for i in range(len(PROMPTS))]
    cpu, _ = run(llama, params, device="cpu", dtype="float32", num_gpu_blocks_override=100)
    cuda, _ = run(llama, params, device="cuda", dtype="float32", num_gpu_blocks_override=100)
    same = [a.token_ids == b.token_ids for a, b in zip(cpu, cuda)]
    assert sum(same) >= len(same) - 1  # a draw can fall between two roundings of one boundary


@pytest.mark.usefixtures("whole_device")
@pytest.mark.parametrize("name", ["llama-bf16", "qwen2-bf16"])
def test_the_oracle_on_cuda_with_a_measured_cache(name, shared_fixtures):
    """KV size measured on the device: nothing overridden but the share of memory."""
    oracle = load_file(shared_fixtures / name / "oracle" / "oracle.safetensors")
    prompts = [oracle[f"input_ids_{i}"].flatten().tolist() for i in range(3)]
    torch.backends.cuda.matmul.allow_tf32 = False
    llm = LLM(str(shared_fixtures / name), device="cuda", dtype="float32", gpu_memory_utilization=0.5,
              use_tqdm_on_load=False)
    assert llm.llm_engine.client.layout.max_tokens >= 256 * 2048 or torch.cuda.mem_get_info()[1] < 60 * 2**30
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [oracle[f"greedy_{i}"].flatten().tolist() for i in range(3)]


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_bfloat16_runs_and_agrees_mostly(llama, cache):
    settings = dict(dtype="bfloat16", num_gpu_blocks_override=100, kv_cache_dtype=cache)
    cpu, _ = run(llama, device="cpu", **settings)
    cuda, _ = run(llama, device="cuda", **settings)
    first = [a.token_ids[0] == b.token_ids[0] for a, b in zip(cpu, cuda)]
    assert sum(first) >= len(first) - 1
