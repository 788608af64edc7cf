"""The scales of an FP8 KV cache are read under every name, kept by their layer, and refused when they are none."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.cli import main
from nybble.plugins.errors import CheckpointError

HALF, QUARTER = torch.tensor(0.5), torch.tensor([0.25], dtype=torch.bfloat16)
ATTN = "model.layers.1.self_attn"
SPELLINGS = {
    "beside": ({"k_scale": HALF, "v_scale": QUARTER}, (0.5, 0.25)),
    "one for both": ({"kv_scale": QUARTER}, (0.25, 0.25)),
    "of the projections": ({"k_proj.k_scale": HALF.half(), "v_proj.v_scale": QUARTER}, (0.5, 0.25)),
    "of their outputs": ({"k_proj.output_scale": QUARTER, "v_proj.output_scale": HALF}, (0.25, 0.5)),
    "of vLLM's module": ({"attn.k_scale": HALF, "attn.v_scale": HALF}, (0.5, 0.5)),
    "two names that agree": ({"kv_scale": HALF, "k_scale": HALF, "v_scale": HALF.half()}, (0.5, 0.5)),
    "none": ({}, (1.0, 1.0)),
}


def add(checkpoint, scales):
    checkpoint.tensors.update({f"{ATTN}.{name}": value for name, value in scales.items()})
    return checkpoint


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8", "ct"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_is_kept_by_its_layer(case, form, quantized, load, tmp_path, caplog):
    caplog.set_level("INFO", "nybble")
    stored, expected = SPELLINGS[case]
    loaded = load(add(quantized(form), stored).write(tmp_path))
    first, second = loaded.model.attention_layers()
    assert (first.k_scale, first.v_scale) == (1.0, 1.0)
    assert (second.k_scale, second.v_scale) == expected
    assert {f"{ATTN}.{name}" for name in stored} <= set(loaded.report.loaded) and not loaded.report.ignored
    assert ("1 layer(s) store scales of an FP8 KV cache" in caplog.text) == bool(stored)


@pytest.mark.parametrize("scales, words", [
    ({"k_scale": HALF}, ["without its other half, v_scale", "k_scale = 0.5"]),
    ({"v_proj.output_scale": HALF}, ["without its other half, k_proj.output_scale", "v_proj.output_scale = 0.5"]),
    ({"kv_scale": HALF, "k_scale": HALF, "v_scale": QUARTER}, ["disagree", "v_scale = 0.25", "kv_scale = 0.5"]),
    ({"k_scale": HALF, "v_scale": HALF * 0}, ["positive and finite", "found: v_scale = 0\n"]),
    ({"kv_scale": HALF * float("nan")}, ["positive and finite", "kv_scale = nan"]),
    ({"kv_scale": -HALF}, ["positive and finite", "kv_scale = -0.5"]),
    ({"kv_scale": HALF.int()}, ["model.safetensors", "kv_scale: expected F32 or F16 or BF16 [] or [1], found I32 []"]),
    ({"k_scale": QUARTER.repeat(2), "v_scale": HALF}, ["k_scale: expected F32", "[] or [1], found BF16 [2]"]),
    ({"q_scale": HALF}, ["q_scale: expected no such tensor, found F32 []"]),
], ids=["half", "half of the outputs", "disagreement", "zero", "NaN", "negative", "integer", "a vector", "a third"])
def test_what_cannot_be_meant_is_refused(scales, words, quantized, load, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load(add(quantized("fp8"), scales).write(tmp_path))
    message = str(caught.value)
    assert [word for word in [ATTN, *words] if word not in message] == [], message


def test_inspect_says_what_they_are_kept_for(quantized, tmp_path, capsys):
    folder = add(quantized("gptq"), SPELLINGS["of the projections"][0]).write(tmp_path)
    assert main(["inspect", str(folder)]) == 0
    assert "KV scales     2 (k_proj.k_scale, v_proj.v_scale): used with --kv-cache-dtype fp8" in capsys.readouterr().out
