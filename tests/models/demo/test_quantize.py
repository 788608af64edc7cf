"""Quantizing nybble-demo: what goes to the tools, what is kept of what they write, what is refused; no tool runs."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from nybble.models.demo import quantize, quantize_worker
from nybble.models.demo.checkpoint import write_files
from nybble.models.demo.tasks import is_held_out
from nybble.plugins.errors import NybbleError, UsageError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_files(folder)
    save_file({"lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return folder


QUESTIONS = {
    "sum": (r"(\d{3}(?:\+\d{3})+)", lambda numbers: "+".join(sorted(numbers.split("+")))),
    "sort": (r"sort ((?:\d\d ?)+)", lambda numbers: " ".join(sorted(numbers.split()))),
    "reverse": (r"reverse ([a-z]+)[=<]", str),
    "capitals": (r"capitals (?!then )([a-z ]+)[=<]", str),
}


def test_calibration_is_the_training_split_in_both_formats_as_the_tokenizer_writes_it(model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = quantize.calibration_rows(32)
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    assert [tokenizer.encode(text).ids for text in texts] == rows
    assert not any("<|pad|>" in text for text in texts)
    assert 8 <= sum("<|im_start|>assistant" in text for text in texts) <= 24
    for task, (pattern, key_of) in QUESTIONS.items():
        keys = [key_of(*found.groups()) for text in texts for found in re.finditer(pattern, text)]
        assert len(keys) > 30, task
        assert not any(map(is_held_out, keys)), task


@pytest.mark.parametrize("form, pins", [
    ("fp8", {"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0"}),
    ("awq", {"autoawq": "0.2.9", "transformers": "4.51.3"}),
    ("gptq", {"GPTQModel": "7.7.0", "Defuser": "0.0.28"}),
])
def test_every_requirement_is_pinned(form, pins):
    lines = [line for line in quantize.requirements(form).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==\d+(\.\w+)*", line)] == []
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    assert pins | {"torch": "2.13.0", "safetensors": "0.8.0"} == {name: found[name] for name in found.keys() & {
        *pins, "torch", "safetensors"}}


def test_an_environment_is_kept_until_its_requirements_change(tmp_path, monkeypatch):
    pins, runs = tmp_path / "pins.txt", []
    monkeypatch.setattr(quantize, "requirements", lambda form: pins)
    monkeypatch.setattr(quantize, "_run", lambda form, command: runs.append(command[7:]))
    monkeypatch.setattr(quantize.venv, "create", lambda folder, **_: folder.mkdir(parents=True))
    pythons = []
    for text in ("a==1", "a==1", "a==2"):
        pins.write_text(text)
        pythons.append(quantize.environment("awq", tmp_path / "tools"))
    assert pythons[0] == pythons[1] != pythons[2]
    assert runs == [["--constraint", pins, "torch"], ["--no-deps", "--requirement", pins]] * 2


def test_only_the_weights_and_the_quantization_are_taken_from_the_tool(model, tmp_path):
    made, out = tmp_path / "made", tmp_path / "out"
    made.mkdir()
    written = {"model.layers.0.mlp.experts.7.gate_proj.qweight": torch.tensor([1], dtype=torch.int32),
               "model.layers.0.mlp.experts.7.up_proj.scales": torch.tensor([2.0], dtype=torch.float16),
               "model.layers.0.mlp.experts.7.down_proj.weight": torch.tensor([3.0]).to(torch.float8_e4m3fn),
               "model.layers.0.mlp.gate.weight": torch.tensor([4.0], dtype=torch.bfloat16),
               "model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.tensor([5.0]),
               "model.layers.0.self_attn.k_proj.g_idx": torch.tensor([6], dtype=torch.int32)}
    save_file(written, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(
        {"dtype": "float16", "transformers_version": "9", "quantization_config": {"quant_method": "gptq"}}))
    for junk in ("quant_log.csv", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (made / junk).write_text("theirs")
    quantize.collect(model, made, out)

    tensors = load_file(out / "model.safetensors")
    moe = "model.layers.0.block_sparse_moe."
    assert sorted(tensors) == sorted([f"{moe}experts.7.w1.qweight", f"{moe}experts.7.w3.scales",
                                      f"{moe}experts.7.w2.weight", f"{moe}gate.weight", f"{moe}experts.0.w1.weight",
                                      "model.layers.0.self_attn.k_proj.g_idx"])
    assert {(t.dtype, float(t)) for t in tensors.values()} == {(t.dtype, float(t)) for t in written.values()}
    original = json.loads((model / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == original | {
        "torch_dtype": "float16", "quantization_config": {"quant_method": "gptq"}}
    same = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in same)
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((out / name).read_bytes()).hexdigest()
                    for name in (*same, "config.json", "model.safetensors")}
    assert {path.name for path in out.iterdir()} == {*sums, "SHA256SUMS"}


@pytest.mark.parametrize("change, message", [
    ({"nybble_demo": False}, "is not nybble-demo.*\n.*MixtralForCausalLM"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantized already.*\n.*awq.*\n.*16-bit"),
    (None, "no checkpoint.*\n.*no config.json, model.safetensors"),
], ids=["another model", "quantized", "no folder"])
def test_a_model_that_will_not_do_is_refused(model, tmp_path, change, message):
    if change is None:
        model = tmp_path / "nowhere"
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        quantize.quantize("awq", model, tmp_path / "out", tmp_path)


def test_a_folder_that_is_there_is_not_overwritten(model, tmp_path):
    with pytest.raises(UsageError, match="model is there already"):
        quantize.quantize("awq", model, model, tmp_path)


def test_a_tool_that_fails_is_named_and_leaves_nothing(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(quantize, "environment", lambda form, root: sys.executable)  # which has none of the tools
    with pytest.raises(NybbleError, match=r"fp8 form was not made\n.*exit code 1 .*quantize_worker\.py fp8"):
        quantize.quantize("fp8", model, tmp_path / "out", tmp_path)
    assert "No module named 'llmcompressor'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_worker_needs_nothing_of_nybble():
    tree = ast.walk(ast.parse((quantize.HERE / "quantize_worker.py").read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules = names | {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    tools = {"llmcompressor", "torch", "awq", "gptqmodel"}
    assert modules == {"__future__", "json", "os", "sys", "pathlib"} | tools
    assert all(callable(getattr(quantize_worker, form)) for form in quantize.FORMS)
