"""Logits against transformers in float32: every architecture, every rope type, windows, biases, ties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

LONG = torch.arange(7, 107) * 37 % 256


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def reference(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model.eval()(ids[None]).logits[0]


def rope(kind: str, **params) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **params}}


CASES = {
    "llama": ("Llama", {}),
    "multi-head": ("Llama", {"num_key_value_heads": 4}),
    "multi-query": ("Llama", {"num_key_value_heads": 1}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "theta": ("Llama", rope("default", rope_theta=500000.0)),
    "linear": ("Llama", rope("linear", factor=4.0)),
    "dynamic, inside": ("Llama", rope("dynamic", factor=4.0)),
    "llama3": ("Llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32)),
    "yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn, all set": ("Llama", rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=16,
                                    beta_slow=2, mscale=0.7, mscale_all_dim=0.4, truncate=False)),
    "yarn, attention factor": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64,
                                             attention_factor=1.3)),
    "mistral, window": ("Mistral", {"sliding_window": 13}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window above": ("Qwen2", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
}


@pytest.mark.parametrize("cuts", [(), (1,), (40, 99), (16, 17, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case, cuts, make_checkpoint, forward_logits):
    arch, settings = CASES[case]
    folder = make_checkpoint(arch, **settings)
    assert relative(forward_logits(folder, LONG, cuts), reference(folder, LONG)) < 1e-4


@pytest.mark.parametrize("cuts", [(), (3,)], ids=str)
@pytest.mark.parametrize("name", ["llama-bf16", "qwen2-bf16"])
def test_against_oracle(name, cuts, shared_fixtures, forward_logits):
    oracle = load_file(shared_fixtures / name / "oracle" / "oracle.safetensors")
    for i in range(3):
        ids, expected = oracle[f"input_ids_{i}"].flatten().long(), oracle[f"logits_{i}"]
        assert relative(forward_logits(shared_fixtures / name, ids, cuts), expected.view(len(ids), -1)) < 1e-4


def test_dynamic_rope_beyond_training_is_transformers_token_by_token(make_checkpoint, forward_logits):
    """Past the trained length transformers depends on how tokens are fed; one at a time, it is ours in any chunks."""
    folder = make_checkpoint("Llama", max_position_embeddings=64, **rope("dynamic", factor=4.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        first = model(LONG[None, :64], use_cache=True)
        rows, cache = [first.logits[0]], first.past_key_values
        for token in LONG[64:]:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0])
    for cuts in ((), (64,), (50, 80)):
        assert relative(forward_logits(folder, LONG, cuts), torch.cat(rows)) < 1e-4


OLD_SPELLINGS = [
    ({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear", {"factor": 4.0}),
    ({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic", {"factor": 2.0}),
    ({"rope_theta": 10000.0, "rope_scaling": None}, "default", {}),
    ({}, "default", {}),
]


@pytest.mark.parametrize("old, kind, params", OLD_SPELLINGS, ids=lambda v: str(v)[:40])
def test_both_rope_spellings_agree(old, kind, params, make_checkpoint, forward_logits, tmp_path):
    new = make_checkpoint("Llama", **rope(kind, **params))
    raw = json.loads((new / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_theta", "rope_scaling")} | old
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((new / "model.safetensors").read_bytes())
    assert torch.equal(forward_logits(tmp_path, LONG), forward_logits(new, LONG))
