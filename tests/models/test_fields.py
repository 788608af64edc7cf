"""A config.json that a model does not implement is refused with the field named, never guessed."""

from __future__ import annotations

import pytest
import torch

from nybble.models import Fields, Make
from nybble.models.llama import LlamaForCausalLM
from nybble.models.qwen2 import Qwen2ForCausalLM
from nybble.plugins.errors import CheckpointError

BASE = dict(architectures=["X"], model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_act="silu",
            max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0)


def build(model=LlamaForCausalLM, **changes):
    raw = {k: v for k, v in (BASE | changes).items() if v is not ...}
    return model(Fields(raw, "TestModel"), Make(dtype=torch.float32, device=torch.device("cpu"), max_len=64))


REFUSED = {
    "unknown field": (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "two unknown fields": (dict(query_pre_attn_scalar=8, final_logit_softcapping=30.0),
                           "final_logit_softcapping, query_pre_attn_scalar"),
    "activation": (dict(hidden_act="gelu"), "hidden_act"),
    "missing": (dict(hidden_size=...), "hidden_size"),
    "null where needed": (dict(rms_norm_eps=None), "rms_norm_eps"),
    "text for a number": (dict(num_hidden_layers="2"), "num_hidden_layers"),
    "bool for a number": (dict(num_hidden_layers=True), "num_hidden_layers"),
    "negative": (dict(vocab_size=-1), "vocab_size"),
    "rope type": (dict(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    "rope parameter": (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "bend": 1}), "bend"),
    "rope parameter missing": (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "high_freq_factor"),
    "rope parameter of text": (dict(rope_scaling={"rope_type": "linear", "factor": "2"}), "factor.*\n.*'2'"),
    "rope parameter of 0": (dict(rope_scaling={"rope_type": "yarn", "factor": 0}), "factor.*\n.*0\n.*positive"),
    "rope flag of text": (dict(rope_scaling={"rope_type": "yarn", "factor": 2, "truncate": "no"}), "truncate"),
    "endless theta": (dict(rope_theta=..., rope_parameters={"rope_theta": 10**400}), "rope_theta"),
    "partial rotary": (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
                       "partial_rotary_factor"),
    "two thetas": (dict(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "rope_theta"),
    "two scalings": (dict(rope_scaling={"type": "linear", "factor": 2.0},
                          rope_parameters={"rope_type": "linear", "factor": 4.0}), "disagree"),
    "window on a Llama": (dict(sliding_window=4), "sliding_window"),
    "not causal": (dict(is_causal=False), "is_causal"),
    "mistral without window": (dict(model_type="mistral"), "sliding_window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    changes, named = REFUSED[case]
    with pytest.raises(CheckpointError, match=named):
        build(**changes)


HARMLESS = {
    "training": dict(attention_dropout=0.1, initializer_range=0.02, use_cache=True, pretraining_tp=2),
    "off": dict(attn_logit_softcapping=None, some_switch=False),
    "private": dict(_name_or_path="x", _attn_implementation="sdpa"),
    "same scaling twice": dict(rope_scaling={"type": "linear", "factor": 2.0},
                               rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_fields_pass(case):
    build(**HARMLESS[case])


def windows(model):
    return [layer.sliding_window for layer in model.attention_layers()]


def test_qwen2_windows():
    on = dict(use_sliding_window=True, sliding_window=8)
    assert windows(build(Qwen2ForCausalLM, use_sliding_window=False, sliding_window=8)) == [None, None]
    assert windows(build(Qwen2ForCausalLM, **on, max_window_layers=1)) == [None, 8]
    assert windows(build(Qwen2ForCausalLM, use_sliding_window=True, sliding_window=None)) == [None, None]
    assert windows(build(Qwen2ForCausalLM, **on, max_window_layers=0)) == [8, 8]
    kinds = ["sliding_attention", "full_attention"]
    assert windows(build(Qwen2ForCausalLM, **on, layer_types=kinds)) == [8, None]
    with pytest.raises(CheckpointError, match="layer_types"):
        build(Qwen2ForCausalLM, **on, layer_types=["chunked_attention"] * 2)
    with pytest.raises(CheckpointError, match="layer_types"):
        build(Qwen2ForCausalLM, layer_types=kinds)  # windows without the switch: a contradiction


def test_fused_slots_are_views_of_their_rows():
    model = build(Qwen2ForCausalLM)
    slots = {slot.name: slot for slot in model.slots()}
    qkv = model.layers[1].attn.qkv
    for name, rows in (("q_proj", slice(0, 16)), ("k_proj", slice(16, 24)), ("v_proj", slice(24, 32))):
        slots[f"model.layers.1.self_attn.{name}.weight"].target.fill_(7)
        slots[f"model.layers.1.self_attn.{name}.bias"].target.fill_(5)
        assert (qkv.weights["weight"][rows] == 7).all() and (qkv.bias[rows] == 5).all()
    assert "model.layers.1.self_attn.o_proj.bias" not in slots
