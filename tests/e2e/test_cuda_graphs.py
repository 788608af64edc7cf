"""On a CUDA device neither capturing steps nor running one step ahead changes a token."""

from __future__ import annotations

import random

import pytest
import torch

from nybble import LLM, SamplingParams

pytestmark = pytest.mark.gpu

RNG = random.Random(2)
PROMPTS = [[RNG.randrange(5, 261) for _ in range(RNG.choice([1, 5, 16, 17, 64, 90]))] for _ in range(13)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
MIXED = [
    SamplingParams(temperature=[0.0, 0.9][i % 2], seed=i, max_tokens=6 + 3 * i, ignore_eos=True,
                   **[{}, {"top_k": 20}, {"logprobs": 2}, {"presence_penalty": 0.5}][i % 4])
    for i in range(len(PROMPTS))
]
MODELS = {
    "llama": ("Llama", {}),
    "window": ("Mistral", {"sliding_window": 13}),
    "latent": ("DeepseekV2", dict(num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16,
                                  qk_rope_head_dim=8, v_head_dim=24, n_routed_experts=8, num_experts_per_tok=3,
                                  moe_intermediate_size=32, first_k_dense_replace=2)),
}


def tokens(model, params, **settings):
    torch.backends.cuda.matmul.allow_tf32 = False
    llm = LLM(str(model), use_tqdm_on_load=False, device="cuda", dtype="float32", max_num_seqs=16,
              **{"num_gpu_blocks_override": 200} | settings)
    found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    report = llm.llm_engine.client.core.executor.worker.runner.capture_report
    llm.shutdown()
    return found, report


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_checkpoint):
    arch, settings = MODELS[request.param]
    return make_checkpoint(arch, **settings)


@pytest.mark.parametrize("params", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_graphs_and_steps_ahead_change_no_token(model, params):
    plain, report = tokens(model, params, enforce_eager=True, async_scheduling=False)
    assert report is None
    for settings in ({}, {"async_scheduling": False}, {"enforce_eager": True}, {"block_size": 64},
                     {"num_gpu_blocks_override": 14}, {"max_num_batched_tokens": 32}):
        found, report = tokens(model, params, **settings)
        assert found == plain, settings
        assert (report is None) is ("enforce_eager" in settings)
        if report is not None:
            assert report.sizes[-1] == 16 and report.seconds < 60


def test_a_failed_capture_is_told_and_survived(make_checkpoint, monkeypatch, caplog):
    from nybble.engine.attention.torch_paged import TorchPagedBackend

    monkeypatch.setattr(TorchPagedBackend, "capturable", True)  # it reads lengths on the host: graphs would be wrong
    model = make_checkpoint("Llama")
    monkeypatch.setattr(torch.cuda, "graph", _refusing)
    with caplog.at_level("WARNING", logger="nybble"):
        found, report = tokens(model, GREEDY, attention_backend="torch")
    assert report.sizes == () and "cannot be captured" in caplog.text
    monkeypatch.undo()
    assert found == tokens(model, GREEDY, attention_backend="torch")[0]


def _refusing(*_, **__):
    raise RuntimeError("operation not permitted when stream is capturing")
