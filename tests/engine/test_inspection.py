"""`nybble inspect` reads headers, reports every layer and what loading would refuse, and takes no memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.engine.args import EngineArgs
from nybble.engine.cli import main
from nybble.engine.inspection import inspect_checkpoint
from nybble.plugins.manager import PluginHost


@pytest.fixture
def qwen2(make_checkpoint, tmp_path):
    for file in make_checkpoint("Qwen2", tie_word_embeddings=True).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def inspect(folder):
    host = PluginHost.load(allow="")
    args = EngineArgs(model=str(folder), dtype="float32", device="cpu")
    return inspect_checkpoint(args.create_engine_config(host), host)


def edit(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    weights.update(changes)
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


def test_bytes_and_layers(qwen2):
    found = inspect(qwen2)
    sizes = {k: v.nbytes for k, v in load_file(qwen2 / "model.safetensors").items()}
    assert sum(found.bytes_by_role.values()) == sum(sizes.values())
    assert found.bytes_by_role["embed"] == sizes["model.embed_tokens.weight"] and "head" not in found.bytes_by_role
    assert [layer.name for layer in found.layers[:2]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.self_attn.o_proj"]
    assert not found.problems and not found.findings


def test_what_loading_would_refuse_and_odd_scales(qwen2, capsys):
    edit(qwen2, **{"model.norm.weight": None, "model.layers.0.mlp.up_proj.weight_scale": torch.tensor([0.0, 1.0])})
    found = inspect(qwen2)
    assert any("model.norm.weight" in p for p in found.problems) and any("weight_scale" in p for p in found.problems)
    assert len(found.findings) == 1 and "1 zero of 2 scales" in found.findings[0]
    assert main(["inspect", str(qwen2), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["architecture"] == "Qwen2ForCausalLM"
    assert main(["inspect", str(qwen2)]) == 3
    assert "would be refused:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["inspect"], ["generate", "-p", "x"]], ids=lambda c: c[0])
def test_a_method_that_no_layer_is_stored_by_is_refused(qwen2, command, capsys):
    config = '{"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}'
    assert main([command[0], str(qwen2), *command[1:], "--hf-overrides", config]) == 3
    assert "no layer is stored that way" in capsys.readouterr().err


def test_experts_router_and_shared_experts_are_counted_apart(make_checkpoint, capsys):
    folder = make_checkpoint("Qwen2Moe", moe_intermediate_size=48, shared_expert_intermediate_size=80, num_experts=6,
                             num_experts_per_tok=2, mlp_only_layers=[1])
    sizes = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    layer = "model.layers.0.mlp."
    expected = {role: sum(size for name, size in sizes.items() if name.startswith(tuple(f"{layer}{p}" for p in parts)))
                for role, parts in {"router": ["gate."], "experts": ["experts."],
                                    "shared": ["shared_expert.", "shared_expert_gate."]}.items()}
    expected["mlp"] = sum(size for name, size in sizes.items() if name.startswith("model.layers.1.mlp."))
    found = inspect(folder).bytes_by_role
    assert {role: found[role] for role in expected} == expected and all(expected.values())
    assert sum(found.values()) == sum(sizes.values())
    assert main(["inspect", str(folder)]) == 0
    assert "model.layers.*.mlp.experts.*.gate_proj+up_proj x6" in capsys.readouterr().out


@pytest.mark.parametrize("name, experts", [("mixtral-gptq-int4", 8), ("qwen2moe-fp8-block", 8)])
def test_what_quantizers_wrote(shared_fixtures, name, experts):
    found = inspect(shared_fixtures / name)
    assert not found.problems and not found.findings
    assert sum(".experts." in layer.name for layer in found.layers) == 2 * experts
    assert found.bytes_by_role["experts"] == sum(layer.bytes for layer in found.layers if ".experts." in layer.name)
