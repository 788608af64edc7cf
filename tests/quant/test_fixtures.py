"""Every Llama and Qwen2 checkpoint that a real quantizer wrote, against the tool's own dequantization."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from nybble import LLM, SamplingParams

NAMES = [
    "llama-awq", "llama-ct-fp8-dynamic", "llama-ct-w4a16-actorder", "llama-fp8-block", "llama-fp8-static",
    "llama-gptq-int4", "llama-gptq-int4-actorder", "llama-gptq-int4-asym-v2",
    "mixtral-awq", "mixtral-bf16", "mixtral-ct-fp8-dynamic", "mixtral-ct-w4a16", "mixtral-fp8-block", "mixtral-fp8-static",
    "mixtral-gptq-int4", "mixtral-gptq-int4-actorder", "mixtral-gptq-int4-asym", "mixtral-gptq-int8", "qwen2-awq", "qwen2-ct-fp8-dynamic",
    "qwen2-ct-fp8-static", "qwen2-fp8-block", "qwen2-gptq-int4",
]
PROMPTS = range(3)
# llm-compressor rounds the inputs of an expert, which are two-dimensional, by one scale for all its tokens, where the
# format says one for each token: its result depends on the batch, and ours is nearer to it than unrounded inputs are.
ONE_SCALE = ("mixtral-ct-fp8-dynamic", "qwen2moe-ct-fp8-dynamic", "dsv2-ct-fp8-dynamic", "dsv2lite-ct-fp8-dynamic")


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Relative distance at each position."""
    return (a - b).norm(dim=-1) / b.norm(dim=-1)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, shared_fixtures, forward_logits):
    """Float arithmetic on stored weights is exact to rounding; with quantized activations the tool's own noise is
    reproduced: a hundred times nearer to its result than that is to the result with float activations. (At a single
    position a value on the edge between two codes may fall the other way.)"""
    oracle = load_file(shared_fixtures / name / "oracle" / "oracle.safetensors")
    for i in PROMPTS:
        ids = oracle[f"input_ids_{i}"].flatten().long()
        expected = oracle[f"logits_{i}"].view(len(ids), -1)
        found = forward_logits(shared_fixtures / name, ids, (len(ids) // 2,))
        if f"wonly_logits_{i}" in oracle:
            noise = distance(oracle[f"wonly_logits_{i}"].view(len(ids), -1), expected)
            sure = oracle.get(f"router_gap_{i}", torch.ones(len(ids))).flatten()[: len(ids)] > 1e-3
            limit = noise[sure].median() / (1 if name in ONE_SCALE else 100)
            assert distance(found, expected)[sure].median() < limit
        else:
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids(name, shared_fixtures):
    """Equal up to the first step that the oracle itself calls close, where its own two ways of decoding agree."""
    stats = json.loads((shared_fixtures / name / "oracle" / "oracle.json").read_text())["stats"]
    oracle = load_file(shared_fixtures / name / "oracle" / "oracle.safetensors")
    llm = LLM(str(shared_fixtures / name), dtype="float32", device="cpu", num_gpu_blocks_override=50,
              use_tqdm_on_load=False)
    prompts = [oracle[f"input_ids_{i}"].flatten().tolist() for i in PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    for i, output in enumerate(outputs):
        if not stats[f"prompt{i}"]["cacheless_greedy_matches"]:
            continue
        close = (oracle[f"greedy_margin_{i}"].flatten() < 0.1).tolist()
        sure = close.index(True) if True in close else len(close)
        assert output.outputs[0].token_ids[:sure] == oracle[f"greedy_{i}"].flatten().tolist()[:sure]
