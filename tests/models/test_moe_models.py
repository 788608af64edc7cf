"""Models with experts against transformers in float32, under every name that their tensors are stored by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nybble import LLM, SamplingParams
from nybble.plugins.errors import CheckpointError, UsageError

LONG = torch.arange(7, 107) * 37 % 256
PROMPTS = [LONG[:1].tolist(), LONG[:17].tolist(), LONG.tolist()]
QWEN2 = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 6, "num_experts_per_tok": 3,
         "num_hidden_layers": 3}
QWEN3 = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 13}

CASES = {
    "mixtral": ("Mixtral", {}),
    "mixtral, window": ("Mixtral", {"sliding_window": 13}),
    "mixtral, one expert each": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1}),
    "mixtral, wide heads, tied": ("Mixtral", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Moe", QWEN2),
    "qwen2, weights of one": ("Qwen2Moe", {**QWEN2, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen2, no bias": ("Qwen2Moe", {**QWEN2, "qkv_bias": False}),
    "qwen2, every second layer": ("Qwen2Moe", {**QWEN2, "decoder_sparse_step": 2}),
    "qwen2, dense layers": ("Qwen2Moe", {**QWEN2, "mlp_only_layers": [0, 2]}),
    "qwen2, window": ("Qwen2Moe", {**QWEN2, **WINDOW}),
    "qwen2, window below": ("Qwen2Moe", {**QWEN2, **WINDOW, "max_window_layers": 2}),
    "qwen2, window by layer": ("Qwen2Moe", {**QWEN2, **WINDOW, "layer_types": [
        "full_attention", "sliding_attention", "sliding_attention"]}),
    "qwen3": ("Qwen3Moe", QWEN3),
    "qwen3, weights of one": ("Qwen3Moe", {**QWEN3, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3, biased": ("Qwen3Moe", {**QWEN3, "attention_bias": True}),
    "qwen3, narrow heads": ("Qwen3Moe", {**QWEN3, "head_dim": 16}),
    "qwen3, dense layers": ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [1], "num_hidden_layers": 3}),
    "qwen3, every second layer": ("Qwen3Moe", {**QWEN3, "decoder_sparse_step": 2}),
    "qwen3, window": ("Qwen3Moe", {**QWEN3, **WINDOW}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case, make_checkpoint, forward_logits):
    arch, settings = CASES[case]
    folder = make_checkpoint(arch, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model.eval()(LONG[None]).logits[0]
    for cuts in ((), (16, 17, 64)):
        found = forward_logits(folder, LONG, cuts)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", ["mixtral", "mixtral, window", "qwen2", "qwen2, window", "qwen3", "qwen3, window"])
def test_greedy_ids(case, make_checkpoint, transformers_greedy):
    arch, settings = CASES[case]
    folder = make_checkpoint(arch, **settings)
    llm = LLM(str(folder), dtype="float32", device="cpu", num_gpu_blocks_override=50, use_tqdm_on_load=False)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    assert [output.outputs[0].token_ids for output in outputs] == transformers_greedy(folder, PROMPTS, 20)


def rewrite(folder: Path, source: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


# The parts of Mixtral's names that tools write in two ways, each for itself.
BLOCK = {".block_sparse_moe.": ".mlp."}
MATRICES = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


@pytest.mark.parametrize("new", [BLOCK, MATRICES, BLOCK | MATRICES], ids=["block", "matrices", "both"])
def test_mixtral_under_other_names_is_the_same_model(new, make_checkpoint, forward_logits, tmp_path):
    source = make_checkpoint("Mixtral")
    tensors = load_file(source / "model.safetensors")
    for old in new:
        assert any(old in name for name in tensors)
        tensors = {name.replace(old, new[old]): tensor for name, tensor in tensors.items()}
    assert torch.equal(forward_logits(rewrite(tmp_path, source, tensors), LONG), forward_logits(source, LONG))


@pytest.mark.parametrize("case", ["mixtral", "qwen2", "qwen3"])
def test_stacks_are_the_same_model(case, make_checkpoint, stacked, forward_logits):
    arch, settings = CASES[case]
    source = make_checkpoint(arch, **settings)
    folder = stacked(source)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")
    assert torch.equal(forward_logits(folder, LONG), forward_logits(source, LONG))


def half_experts(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name][:3].clone()


def no_gate_up(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.gate_up_proj"]


def two_kinds(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.zeros(64, 48)


@pytest.mark.parametrize("damage, says", [
    (half_experts, r"layers.0.mlp.experts.down_proj.*\[6, 64, 48\].*\[3, 64, 48\]"),
    (no_gate_up, r"layers.1.mlp.experts.gate_up_proj.*nothing in"),
    (two_kinds, r"experts.0.down_proj.weight.*no such tensor"),
], ids=["half the experts", "no gate and up", "two kinds"])
def test_broken_stacks_are_refused(damage, says, make_checkpoint, stacked, forward_logits):
    folder = stacked(make_checkpoint("Qwen3Moe", **QWEN3))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        forward_logits(folder, LONG)


@pytest.mark.parametrize("case, changes, says", [
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "does not implement layer_types"),
    ("qwen2", {"mlp_only_layers": [3]}, "mlp_only_layers must list numbers from 0 to 2"),
    ("qwen2", {"mlp_only_layers": ["1"]}, "mlp_only_layers must list numbers from 0 to 2"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be positive"),
    ("qwen2", {"num_experts_per_tok": 7}, "7 of 6 experts"),
    ("qwen3", {"num_local_experts": None}, "num_experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "9 of 8 experts"),
], ids=["window that is off", "no such layer", "no number", "window of none", "too many of qwen2", "no experts",
        "too many of mixtral"])
def test_settings_that_cannot_be_meant(case, changes, says, make_checkpoint, forward_logits, tmp_path):
    arch, settings = CASES[case]
    source = make_checkpoint(arch, **settings)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=says):
        forward_logits(tmp_path, LONG)


def test_the_hub_names_of_qwen3_settings(make_checkpoint, forward_logits, tmp_path):
    source = make_checkpoint("Qwen3Moe", **QWEN3)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    coder = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}  # what Qwen3-Coder adds
    (tmp_path / "config.json").write_text(json.dumps({**config, **coder, "max_window_layers": 48}))
    assert torch.equal(forward_logits(tmp_path, LONG), forward_logits(source, LONG))


@pytest.mark.parametrize("pin, says", [
    ("referense", "no MoE backend is named 'referense'.*did you mean reference"),
    ("fused", "block_sparse_moe.experts: the pinned MoE backend fused cannot run.*CUDA"),
], ids=["unknown", "refuses"])
def test_a_pin_is_taken_or_refused(pin, says, make_checkpoint):
    with pytest.raises(UsageError, match=f"(?s){says}"):
        LLM(str(make_checkpoint("Mixtral")), device="cpu", dtype="float32", moe_backend=pin, use_tqdm_on_load=False)
