"""Every architecture with experts in every form: the logits of the matrices that the codes stand for."""

from __future__ import annotations

import pytest
import torch

EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64)
LATENT = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1,
              first_k_dense_replace=1, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
              num_key_value_heads=4, n_group=2, topk_group=1)
ARCHITECTURES = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 96},
    "Qwen3Moe": {**EXPERTS, "head_dim": 32},
    "DeepseekV2": {**LATENT, "q_lora_rank": 64, "topk_method": "group_limited_greedy"},
    "DeepseekV3": {**LATENT, "q_lora_rank": None, "num_nextn_predict_layers": 0},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["gptq", "awq", "fp8", "fp8-block", "ct"])
def test_logits(arch, form, quantized, forward_logits, tmp_path):
    checkpoint = quantized(form, arch, **ARCHITECTURES[arch])
    ids = torch.randint(5, 300, (23,), generator=torch.Generator().manual_seed(0))
    found = forward_logits(checkpoint.write(tmp_path / "quantized"), ids, (9,))
    expected = forward_logits(checkpoint.write_dense(tmp_path / "dense"), ids)
    assert len(checkpoint.tensors) > len(checkpoint.dense) + 20  # experts were quantized too
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
