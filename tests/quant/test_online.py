"""FP8 made of a 16-bit checkpoint while it is loaded: right values, and never a 16-bit copy of the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble import LLM, SamplingParams
from nybble.csrc.quantize import quantize
from nybble.plugins.errors import CheckpointError, UsageError
from nybble.quant import LayerShape, Linear, Part
from nybble.quant.online import ROW, OnlineFp8Method

MEASURE = """
import sys, threading, psutil, torch
from nybble.engine.args import EngineArgs
from nybble.engine.loader import get_model
from nybble.plugins.manager import PluginHost
host = PluginHost.load()
args = dict(model=sys.argv[1], device="cpu", dtype="float32", use_tqdm_on_load=False, skip_tokenizer_init=True)
config = EngineArgs(**args, quantization="fp8").create_engine_config(host)
process, peak, done = psutil.Process(), 0, threading.Event()
before = process.memory_info().rss
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, process.memory_info().rss)
thread = threading.Thread(target=watch)
thread.start()
loaded = get_model(config, host, torch.device("cpu"))
done.set()
thread.join()
print(sum(layer.bytes for layer in loaded.layers), peak - before)
"""


def linear_of(*parts: int, inputs: int = 96) -> Linear:
    shape = LayerShape(in_features=inputs, parts=tuple(Part(name=f"p{i}", size=size) for i, size in enumerate(parts)))
    return Linear("layer", shape, OnlineFp8Method.per_channel(), dtype=torch.float32, device=torch.device("cpu"))


def test_rows_are_rounded_wherever_a_piece_ends():
    weights = {f"layer.p{i}.weight": torch.randn(size, 96, dtype=torch.bfloat16) for i, size in enumerate((40, 24))}
    weights["layer.p0.weight"][3] = 0
    linear = linear_of(40, 24)
    slots = list(linear.slots())
    assert [slot.name for slot in slots] == list(weights)
    for slot in slots:
        for row in range(0, len(slot.target), 7):
            slot.put(row, weights[slot.name][row : row + 7])
    linear.after_load()
    whole = torch.cat(list(weights.values())).float()
    scale = (whole.abs().amax(1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).eps)
    assert torch.equal(linear.method.dequant(linear.weights), (whole / scale).to(torch.float8_e4m3fn).float() * scale)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(wrong):
    linear = linear_of(8)
    [slot] = linear.slots()
    slot.put(0, torch.full((8, 96), wrong))
    with pytest.raises(CheckpointError, match="weight_scale"):
        linear.after_load()


QUICK = dict(device="cpu", dtype="float32", skip_tokenizer_init=True, use_tqdm_on_load=False,
             num_gpu_blocks_override=20)
FP8_CHANNEL = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    }},
}


def greedy(folder: Path, **settings) -> tuple[list[int], dict[str, str]]:
    """Tokens of a prompt, and how each layer is stored."""
    llm = LLM(str(folder), **QUICK, **settings)
    [output] = llm.generate([{"prompt_token_ids": [5, 9, 200, 31]}], SamplingParams(temperature=0, max_tokens=12),
                            use_tqdm=False)
    schemes = {layer.layer: layer.scheme for layer in llm.llm_engine.layers}
    llm.shutdown()
    return output.outputs[0].token_ids, schemes


QWEN2MOE = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 6,
            "num_experts_per_tok": 2}


@pytest.mark.parametrize("arch, settings", [("Llama", {}), ("Mixtral", {}), ("Qwen2Moe", QWEN2MOE)],
                         ids=["Llama", "Mixtral", "Qwen2Moe"])
def test_tokens_are_those_of_a_checkpoint_quantized_beforehand(arch, settings, make_checkpoint, stacked, tmp_path):
    source = make_checkpoint(arch, **settings)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if re.search(r"(_proj|\.w[123])\.weight$", name)]:
        codes, scales = quantize(tensors[name], ROW)
        tensors |= {name: codes, f"{name}_scale": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FP8_CHANNEL}))
    tokens, schemes = greedy(source, quantization="fp8")
    assert (tokens, schemes) == greedy(tmp_path)
    plain = {name for name, scheme in schemes.items() if scheme == "float32"}
    assert "lm_head" in plain and all(name == "lm_head" or name.endswith(".shared_expert_gate") for name in plain)
    assert {schemes[name] for name in schemes.keys() - plain} == {"fp8, input fp8_e4m3 per token dynamic"}
    if arch != "Llama":
        from_stacks, schemes = greedy(stacked(source), quantization="fp8")
        assert from_stacks == tokens and {schemes[name] for name in schemes if ".experts." in name} == {
            "fp8, input fp8_e4m3 per token dynamic"}


def test_a_method_that_cannot_says_so(llama):
    with pytest.raises(UsageError, match="GPTQConfig cannot quantize a checkpoint while it is loaded"):
        LLM(str(llama), quantization="gptq", skip_tokenizer_init=True)


BIG = {
    "dense": ("Llama", dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4)),
    "stacks": ("Mixtral", dict(hidden_size=512, intermediate_size=1536, num_local_experts=18, num_hidden_layers=1)),
}


@pytest.mark.parametrize("kind", BIG)
def test_peak_memory(kind, make_checkpoint, stacked):
    """Loading 40 M matrix elements takes their FP8 bytes and a piece, far from the 80 MB of 16 bits on top."""
    arch, settings = BIG[kind]
    folder = make_checkpoint(arch, vocab_size=300, **settings)
    folder = stacked(folder) if kind == "stacks" else folder
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    linear, peak = map(int, done.stdout.split())
    assert linear > 40e6
    assert peak < 1.4 * linear + 64e6
