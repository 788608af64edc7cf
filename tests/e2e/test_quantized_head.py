"""A quantized lm_head computes what its dequantized self does in transformers; a tied model cannot have one."""

from __future__ import annotations

import pytest
import torch
import transformers

from nybble.plugins.errors import CheckpointError

IDS = torch.arange(7, 107) * 37 % 256
SETTINGS = {"gptq": {"lm_head": True}, "awq": {"lm_head": True}, "fp8": {}, "ct": {}}


def head_tensors(checkpoint):
    return {name.removeprefix("lm_head.") for name in checkpoint.tensors if name.startswith("lm_head")}


@pytest.mark.parametrize("head", [False, True], ids=["plain head", "quantized head"])
@pytest.mark.parametrize("form", SETTINGS)
def test_logits_are_those_of_the_dequantized_model(form, head, quantized, forward_logits, tmp_path):
    checkpoint = quantized(form, head=head, vocab_size=304)
    checkpoint.settings.update(SETTINGS[form] if head else {})
    assert (head_tensors(checkpoint) == {"weight"}) == (not head)
    dense = checkpoint.write_dense(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model.eval()(IDS[None]).logits[0]
    found = forward_logits(checkpoint.write(tmp_path / "quantized"), IDS, (40,))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("form", SETTINGS)
def test_a_tied_model_with_a_quantized_head_is_refused(form, quantized, forward_logits, tmp_path):
    checkpoint = quantized(form, head=True, vocab_size=304)
    checkpoint.config["tie_word_embeddings"] = True
    with pytest.raises(CheckpointError) as caught:
        forward_logits(checkpoint.write(tmp_path), IDS)
    message = str(caught.value)
    assert all(f"lm_head.{name}" in message for name in head_tensors(checkpoint)), message
    assert "tie_word_embeddings" in message and "model.safetensors" in message
