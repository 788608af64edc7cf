"""DeepSeek-V2 and V3 against transformers in float32: logits and greedy ids, with every option their configs have."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nybble import LLM, SamplingParams
from nybble.engine.attention import torch_paged
from nybble.models import Fields
from nybble.models.deepseek_v2 import DeepseekV2Config, DeepseekV3Config
from nybble.moe import Routing
from nybble.plugins.errors import CheckpointError

LONG = torch.arange(7, 107) * 37 % 256
LATENT = dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=24, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=32,
              first_k_dense_replace=1, n_group=1, topk_group=1)
DENSE = {**LATENT, "first_k_dense_replace": 2}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
                            "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}}
YARN_APART = {"rope_parameters": {**YARN["rope_parameters"], "mscale": 1.0, "mscale_all_dim": 0.5}}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0}
V3 = {**LATENT, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
CASES = {
    "dense, lite": ("DeepseekV2", DENSE),
    "dense, q_lora": ("DeepseekV2", {**DENSE, "q_lora_rank": 48}),
    "dense, biased": ("DeepseekV2", {**DENSE, "q_lora_rank": 48, "attention_bias": True, "mlp_bias": True}),
    "dense, yarn": ("DeepseekV2", {**DENSE, **YARN}),
    "dense, yarn apart": ("DeepseekV2", {**DENSE, **YARN_APART}),
    "dense, tied": ("DeepseekV2", {**DENSE, "tie_word_embeddings": True}),
    "lite": ("DeepseekV2", {**LATENT, **YARN}),
    "lite, biased": ("DeepseekV2", {**LATENT, "attention_bias": True, "mlp_bias": True}),
    "v2": ("DeepseekV2", {**LATENT, **GROUPED, "q_lora_rank": 48}),
    "all experts": ("DeepseekV2", {**LATENT, "first_k_dense_replace": 0}),
    "v3": ("DeepseekV3", {**V3, **YARN_APART}),
    "v3, halves": ("DeepseekV3", {**V3, "rope_interleave": False, "norm_topk_prob": False}),
    "v3, lite": ("DeepseekV3", {**V3, "q_lora_rank": None, "attention_bias": True}),
}
CUTS = {"whole": (), "one first": (1,), "one last": (40, 99), "blocks": (16, 17, 64)}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits(case, cuts, make_checkpoint, forward_logits):
    arch, settings = CASES[case]
    folder = make_checkpoint(arch, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model.eval()(LONG[None]).logits[0]
    found = forward_logits(folder, LONG, CUTS[cuts])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("tokens", [4, 8, 13])
def test_a_prefix_expanded_in_chunks_is_the_same(tokens, make_checkpoint, forward_logits, monkeypatch):
    folder = make_checkpoint("DeepseekV2", **DENSE)
    expected = forward_logits(folder, LONG)
    monkeypatch.setattr(torch_paged, "EXPANDED_TOKENS", tokens)
    for cuts in CUTS.values():
        assert (forward_logits(folder, LONG, cuts) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_token_takes_one_row_of_the_cache(make_checkpoint):
    """32 + 8 values in each of 2 layers; K and V of 4 heads would be 4 * (24 + 24) and more."""
    folder = make_checkpoint("DeepseekV2", **DENSE)
    llm = LLM(str(folder), dtype="bfloat16", kv_cache_memory_bytes=1 << 16, block_size=16, use_tqdm_on_load=False)
    assert llm.llm_engine.client.core.executor.layout.num_blocks == (1 << 16) // ((32 + 8) * 2 * 2 * 16)
    llm.shutdown()


def test_what_is_kept_whole_is_not_rounded_while_loading(make_checkpoint):
    llm = LLM(str(make_checkpoint("DeepseekV2", **LATENT)), quantization="fp8", dtype="float32", use_tqdm_on_load=False,
              num_gpu_blocks_override=20)
    found = {layer.layer: layer for layer in llm.llm_engine.client.core.executor.layers}
    llm.shutdown()
    kv_b, out = (found[f"model.layers.0.self_attn.{name}_proj"] for name in ("kv_b", "o"))
    assert (kv_b.scheme, kv_b.kernel, kv_b.bytes) == ("float32", "absorbed", 4 * (16 + 24) * 32 * 4)
    assert out.scheme.startswith("fp8")


@pytest.mark.parametrize("case", ["dense, lite", "lite", "v2", "v3"])
def test_greedy_ids(case, make_checkpoint, transformers_greedy):
    arch, settings = CASES[case]
    folder = make_checkpoint(arch, **settings)
    prompts = [LONG[:n].tolist() for n in (1, 7, 33, 100)]
    llm = LLM(str(folder), dtype="float32", num_gpu_blocks_override=60, use_tqdm_on_load=False)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    assert [o.outputs[0].token_ids for o in outputs] == transformers_greedy(folder, prompts, 12)


# config.json as it is published, without what every architecture has.
PUBLISHED = {
    "hidden_act": "silu", "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "attention_bias": False,
    "aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1,
}
OLD_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
LITE = PUBLISHED | {
    "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "first_k_dense_replace": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "rope_scaling": {**OLD_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
}
R1 = PUBLISHED | {
    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "rope_scaling": {**OLD_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "vocab_size": 129280, "ep_size": 1,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize("config, raw, scale, routing", [
    (DeepseekV2Config, LITE, 0.114714, Routing(top_k=6)),
    (DeepseekV3Config, R1, 0.135234, Routing(top_k=8, score="sigmoid", renormalize=True, scale=2.5, groups=8,
                                             top_groups=4, group_score="top2")),
], ids=["v2-lite", "r1"])
def test_published_configs(config, raw, scale, routing):
    c = config(Fields(raw, "DeepSeek"))
    assert c.scale == pytest.approx(scale, rel=1e-4) and c.routing == routing


def test_layers_that_predict_further_tokens_are_left_out(make_checkpoint, forward_logits, tmp_path):
    folder = make_checkpoint("DeepseekV3", **V3)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.zeros(64, 128)}, tmp_path / "model.safetensors")
    for layers in (1, 0):
        raw = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": layers}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if layers:
            assert torch.equal(forward_logits(tmp_path, LONG), forward_logits(folder, LONG))
        else:
            with pytest.raises(CheckpointError, match="eh_proj"):
                forward_logits(tmp_path, LONG)


def test_a_layer_that_the_config_forgot_is_not_taken_for_one(make_checkpoint, forward_logits, tmp_path):
    folder = make_checkpoint("DeepseekV3", **V3)
    raw = json.loads((folder / "config.json").read_text())
    fewer = {**raw, "num_hidden_layers": raw["num_hidden_layers"] - 1, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fewer))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{raw['num_hidden_layers'] - 1}\."):
        forward_logits(tmp_path, LONG)


REFUSED = {
    "an unknown routing": ({"topk_method": "noaux_tc"}, "topk_method"),
    "sigmoid scores": ({"scoring_func": "sigmoid"}, "scoring_func"),
    "weights that transformers would not normalise": ({"norm_topk_prob": True}, "norm_topk_prob"),
    "fewer KV heads": ({"num_key_value_heads": 2}, "num_key_value_heads"),
    "experts in some layers only": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "no word on q_lora_rank": ({"q_lora_rank": ...}, "q_lora_rank"),
    "groups of unequal size": ({"topk_method": "group_limited_greedy", "n_group": 3}, "n_group"),
    "more groups than there are": ({"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 3}, "topk_gro"),
    "more experts than may be chosen": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "a field nobody knows": ({"attention_sinks": 4}, "attention_sinks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, make_checkpoint, forward_logits, tmp_path):
    changed, word = REFUSED[case]
    folder = make_checkpoint("DeepseekV2", **LATENT)
    raw = json.loads((folder / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=word):
        forward_logits(tmp_path, LONG)
