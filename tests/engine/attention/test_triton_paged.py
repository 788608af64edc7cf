"""The Triton backend gives the torch backend's tokens through the whole engine, by the interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from nybble import LLM, SamplingParams
from nybble.csrc.attention import (
    attend_paged,
    latent_and_cache_reference,
    rope_and_cache_reference,
    write_kv,
    write_rows,
)
from nybble.engine.attention.base import AttentionProblem
from nybble.engine.attention.triton_paged import TritonAttentionBackend

RNG = random.Random(2)
PREFIX = [RNG.randrange(5, 261) for _ in range(32)]
PROMPTS = [[RNG.randrange(5, 261) for _ in range(n)] for n in (1, 16, 40)] + [[*PREFIX, 7], [*PREFIX, 8, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1)
MLA = dict(num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
           v_head_dim=24, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
ONE = {"num_hidden_layers": 1}  # what the interpreter takes half as long for, where layers are not the question
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: see tests/e2e/test_cuda.py")
    monkeypatch.setattr("nybble.engine.attention.triton_paged.missing", lambda device, needed: None)


def store(cache, k, v, slots, *, k_scale=1.0, v_scale=1.0):
    if v is None:
        write_rows(cache, k[:, 0], slots, scale=k_scale)
    else:
        write_kv(cache, k, v, slots, k_scale=k_scale, v_scale=v_scale)


def rope_then_attend(qkv, cos, sin, cache, slots, batch, *, heads, norms, scale, window, **scales):
    q = rope_and_cache_reference(qkv, cos, sin, cache, slots, heads=heads, norms=norms, **scales)
    return attend_paged(q, cache, batch, scale=scale, window=window, **scales)


def generate(model, backend, **settings):
    llm = LLM(str(model), use_tqdm_on_load=False, device="cpu", num_gpu_blocks_override=40, attention_backend=backend,
              max_num_batched_tokens=24, **{"dtype": "float32", **settings})
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    llm.shutdown()
    return [o.token_ids for o in outputs], [o.cumulative_logprob for o in outputs]


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("arch, config, settings", [
    ("Llama", {}, {}), ("Llama", ONE, {"block_size": 64}), ("Mistral", {"sliding_window": 13, **ONE}, {}),
    ("DeepseekV2", MLA | ONE, {})], ids=["llama", "pages of 64", "window", "latent"])
def test_chunks_prefixes_and_decoding(arch, config, settings, cache, make_checkpoint, monkeypatch):
    if cache == "fp8":  # the interpreter rounds to FP8 wrongly
        here = "nybble.engine.attention.triton_paged"
        for name, plain in (("store_kv", store), ("rope_and_cache", rope_and_cache_reference),
                            ("rope_and_attend", rope_then_attend),
                            ("latent_and_cache", latent_and_cache_reference)):
            monkeypatch.setattr(f"{here}.{name}", plain)
    model = make_checkpoint(arch, **config)
    settings = {**settings, "kv_cache_dtype": cache}
    wanted, logprobs = generate(model, "torch", **settings)
    found, theirs = generate(model, "triton", **settings)
    assert found == wanted
    assert theirs == pytest.approx(logprobs, abs=1e-3)
    if cache == "fp8":
        settings["kv_cache_dtype"] = "auto"
        assert generate(model, "torch", **settings)[1] != pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("tokens", [16, 48], ids=["one by one", "in groups"])
def test_latents_of_long_requests_are_expanded_in_parts(tokens, make_checkpoint, monkeypatch):
    monkeypatch.setattr("nybble.engine.attention.triton_paged.EXPANDED_TOKENS", tokens)
    monkeypatch.setattr("nybble.engine.attention.triton_paged.EXPANDED_CHUNK", 16)
    monkeypatch.setattr("nybble.engine.attention.triton_paged.absorbing_is_cheaper", lambda *lengths, **sizes: False)
    model = make_checkpoint("DeepseekV2", **MLA, **ONE)
    assert generate(model, "triton")[0] == generate(model, "torch")[0]


def test_half_precision(shared_fixtures):
    model = shared_fixtures / "llama-bf16"
    assert generate(model, "triton", dtype="float16")[0] == generate(model, "torch", dtype="float16")[0]


def problem(**changes):
    return AttentionProblem(**{**dict(device=CPU, dtype=torch.float16, cache_dtype=torch.float16, head_dim=128,
                                      num_heads=8, num_kv_heads=2, kv_lora_rank=None, sliding_window=None,
                                      block_size=16), **changes})


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"sliding_window": 9}, None), ({"head_dim": 80}, None), ({"kv_lora_rank": 512, "head_dim": 192}, None),
    ({"head_dim": 512}, "head_dim 512 > 256"), ({"dtype": torch.float64}, "computes in 16 or 32 bits, not in float64"),
    ({"kv_lora_rank": 1024}, "latents of 1024 > 512"),
    ({"kv_lora_rank": 32, "sliding_window": 4}, "has no sliding window over latents")])
def test_what_it_refuses(changes, reason):
    assert TritonAttentionBackend.supports(problem(**changes)) == reason


def test_it_runs_on_cuda(monkeypatch):
    monkeypatch.undo()
    assert TritonAttentionBackend.supports(problem()) == "runs on CUDA, not on cpu"
