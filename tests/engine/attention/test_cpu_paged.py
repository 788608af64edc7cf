"""The CPU backend gives the torch backend's tokens through the whole engine, goes first, and is done without."""

from __future__ import annotations

import random

import pytest
import torch

from nybble import LLM, SamplingParams
from nybble.csrc import ops
from nybble.engine.attention.base import AttentionProblem
from nybble.engine.attention.cpu_paged import CpuAttentionBackend
from nybble.engine.attention.select import choose_attention_backend
from nybble.plugins.errors import KernelBuildError, UsageError
from nybble.plugins.manager import PluginHost

RNG = random.Random(5)
PREFIX = [RNG.randrange(5, 261) for _ in range(32)]
PROMPTS = [[RNG.randrange(5, 261) for _ in range(n)] for n in (1, 16, 40, 90)] + [[*PREFIX, 7], [*PREFIX, 8, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
CPU = torch.device("cpu")

built = pytest.mark.skipif(ops.op_missing("cpu_attention", CPU) is not None,
                           reason=str(ops.op_missing("cpu_attention", CPU)))


def generate(model, backend, **settings):
    llm = LLM(str(model), use_tqdm_on_load=False, device="cpu", num_gpu_blocks_override=60, attention_backend=backend,
              max_num_batched_tokens=24, **{"dtype": "float32", **settings})
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    llm.shutdown()
    return [o.token_ids for o in outputs], [o.cumulative_logprob for o in outputs]


@built
@pytest.mark.parametrize("arch, config, settings", [
    ("Llama", {}, {}), ("Llama", {"head_dim": 80, "num_key_value_heads": 1}, {"block_size": 8}),
    ("Mistral", {"sliding_window": 13}, {"block_size": 4}), ("Qwen2", {}, {}),
    ("Qwen3Moe", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), {})],
    ids=["llama", "heads of 80", "window", "biases", "norms of heads"])
def test_chunks_prefixes_and_decoding(arch, config, settings, make_checkpoint):
    model = make_checkpoint(arch, **config)
    wanted, logprobs = generate(model, "torch", **settings)
    found, theirs = generate(model, "cpu", **settings)
    assert found == wanted
    assert theirs == pytest.approx(logprobs, abs=1e-3)


@built
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, shared_fixtures):
    model = shared_fixtures / "llama-bf16"
    assert generate(model, "cpu", dtype=dtype)[0] == generate(model, "torch", dtype=dtype)[0]


def problem(**changes):
    return AttentionProblem(**{**dict(device=CPU, dtype=torch.float32, cache_dtype=torch.float32, head_dim=64,
                                      num_heads=8, num_kv_heads=2, kv_lora_rank=None, sliding_window=None,
                                      block_size=16), **changes})


@built
def test_it_goes_first_where_it_can_run():
    host = PluginHost.load(allow="")
    choice = choose_attention_backend({problem(sliding_window=9)}, None, host)
    assert choice.chosen is CpuAttentionBackend
    assert choice.refusals["torch"] == "cpu goes first (priority 1 over 0)"
    for changes, reason in (({"kv_lora_rank": 512}, "has no kernel for latent attention"),
                            ({"cache_dtype": torch.float8_e4m3fn},
                             "reads a cache of the model's float32, not of float8_e4m3fn")):
        choice = choose_attention_backend({problem(**changes)}, None, host)
        assert choice.chosen.name == "torch" and choice.refusals["cpu"] == reason


@pytest.fixture
def forgetful():
    """What is asked once a process is asked anew, before and after."""
    def forget():
        for function in (ops._missing, ops.optional_op, ops.load_op, ops._tried):
            function.cache_clear()

    forget()
    yield
    forget()


def test_without_a_compiler_torch_runs_and_the_refusal_says_why(forgetful, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "find_tools", lambda device: (None, "there is no g++ on PATH"))
    monkeypatch.setattr(ops, "PACKAGED", tmp_path)
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path))
    host = PluginHost.load(allow="")
    choice = choose_attention_backend({problem()}, None, host)
    assert choice.chosen.name == "torch" and "jit: there is no g++ on PATH" in choice.refusals["cpu"]
    with pytest.raises(UsageError, match=r"(?s)no attention backend can run.*there is no g\+\+ on PATH"):
        choose_attention_backend({problem()}, "cpu", host)


def test_a_build_that_fails_is_a_warning(forgetful, monkeypatch, tmp_path, caplog):
    def failing(library, arch):
        raise KernelBuildError("attention/cpu_attention.cpp does not compile (exit code 1)")

    monkeypatch.setattr(ops, "_missing", lambda library, arch: None)
    monkeypatch.setattr(ops, "obtain", failing)
    with caplog.at_level("WARNING", logger="nybble"):
        choice = choose_attention_backend({problem()}, None, PluginHost.load(allow=""))
    assert choice.chosen.name == "torch" and "did not build or load" in choice.refusals["cpu"]
    assert "cpu_attention.cpp does not compile" in caplog.text
