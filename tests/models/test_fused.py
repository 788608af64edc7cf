"""Whole models with every fused launch, by Triton's interpreter on CPU, give what plain torch gives."""

from __future__ import annotations

import json
from itertools import repeat

import numpy as np
import pytest
import torch

from nybble.engine.args import EngineArgs
from nybble.engine.attention.base import StepShape
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.attention.triton_paged import TritonAttentionBackend
from nybble.engine.loader import get_model
from nybble.engine.plan import KVCacheLayout
from nybble.models import Batch
from nybble.plugins.manager import PluginHost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMMON = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "hidden_act": "silu",
          "intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
          "tie_word_embeddings": False}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "LlamaForCausalLM": {"model_type": "llama", "num_key_value_heads": 2},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 8,
                           "num_experts_per_tok": 2, "sliding_window": 7},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts": 8, "head_dim": 32,
                            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **EXPERTS},
    "DeepseekV2ForCausalLM": {
        "model_type": "deepseek_v2", "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
        "kv_lora_rank": 48, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, **EXPERTS},
}
# (new tokens, tokens in the cache after them) of two requests: a prompt, then one token at a time.
STEPS = [((5, 3), (5, 3)), ((1, 1), (6, 4)), ((1, 1), (7, 5))]


def hidden_states(folder, backend_class):
    """Of all steps, by a model with the made-up weights that a seed gives."""
    host = PluginHost.load(allow="")
    args = EngineArgs(model=str(folder), device=DEVICE.type, load_format="dummy", skip_tokenizer_init=True,
                      dtype="float32", use_tqdm_on_load=False)
    model = get_model(args.create_engine_config(host), host, DEVICE).model
    layout = KVCacheLayout(num_blocks=5, block_size=16, groups=[])
    backend = backend_class(model.attention_layers(), layout, dtype=torch.float32, device=DEVICE)
    table, out = torch.tensor([[3, 1], [2, 4]], dtype=torch.int32), []
    for query_lens, seq_lens in STEPS:
        positions = torch.cat([torch.arange(end - new, end) for new, end in zip(query_lens, seq_lens)])
        request = torch.tensor([r for r, new in enumerate(query_lens) for _ in repeat(None, new)])
        starts = torch.tensor([0, query_lens[0], sum(query_lens)], dtype=torch.int32)
        step = StepShape(query_lens=np.array(query_lens, np.int32), seq_lens=np.array(seq_lens, np.int32),
                         block_table=table.to(DEVICE), host_block_table=table.numpy(),
                         slots=(table[request, positions // 16].long() * 16 + positions % 16).to(DEVICE),
                         query_start=starts.to(DEVICE), max_query_len=max(query_lens),
                         device_seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE))
        ids = (positions * 3 + request).to(DEVICE)
        with torch.inference_mode():
            out.append(model(Batch(ids=ids, positions=positions.to(DEVICE), attn=backend.prepare(step))))
    return torch.cat(out)


@pytest.mark.parametrize("name", MODELS)
def test_fused_models_are_the_plain_ones(monkeypatch, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **MODELS[name], "architectures": [name]}))
    states = {}
    for backend, reason in ((TorchPagedBackend, "asked for plain torch"), (TritonAttentionBackend, None)):
        for module in ("nybble.models.layers", "nybble.moe.router"):
            monkeypatch.setattr(f"{module}.missing", lambda device, needed, reason=reason: reason)
        states[reason] = hidden_states(tmp_path, backend)
    plain, fused = states.values()
    assert plain.abs().max() > 0.5 and not torch.equal(plain, fused)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=2e-5)
