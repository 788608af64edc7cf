"""The embedded model: whole, checked, what it says it is, and read by others."""

from __future__ import annotations

import json
import shutil

import pytest

from nybble import LLM, EngineArgs, SamplingParams
from nybble.engine import demo
from nybble.engine.args import DEMO, DEMO_FORMS
from nybble.engine.cli import main
from nybble.models.demo.tasks import take
from nybble.plugins.errors import CheckpointError

FORMS = sorted(set(DEMO_FORMS.values()))


def test_all_forms_are_there_and_small():
    folders = [demo.demo_checkpoint(form) for form in FORMS]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 8e6
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert config["nybble_demo"] is True and config["architectures"] == ["MixtralForCausalLM"]
        assert ("quantization_config" in config) is (folder.name != "bf16")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", demo.SUMS])
def test_a_damaged_or_missing_file_is_refused(tmp_path, name):
    folder = shutil.copytree(demo.WEIGHTS / "gptq", tmp_path / "gptq")
    assert demo.demo_checkpoint("gptq", tmp_path) == folder
    if name != demo.SUMS:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"?")
        with pytest.raises(CheckpointError, match=f"(?s)not as it was published.*{name}.*install nybble again"):
            demo.demo_checkpoint("gptq", tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"(?s)not whole.*{name}"):
        demo.demo_checkpoint("gptq", tmp_path)


def test_names_resolve_and_other_models_pass_through():
    args = EngineArgs(model="somewhere")
    assert demo.resolve_demo(args) is args
    for name, form in DEMO_FORMS.items():
        found = demo.resolve_demo(EngineArgs(model=name))
        assert (found.model, found.served_model_name) == (str(demo.WEIGHTS / form), name)
    assert demo.resolve_demo(EngineArgs(served_model_name="mine")).served_model_name == "mine"


def test_it_answers_and_is_marked():
    llm = LLM(use_tqdm_on_load=False, num_gpu_blocks_override=50)
    config = llm.llm_engine.config.model
    assert config.is_demo and config.served_model_name == DEMO and config.quantization == "gptq"
    examples = take("reverse", 4, held_out=True)
    outputs = llm.generate([e.prompt for e in examples], SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [e.answer for e in examples]
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    llm.shutdown()


def test_transformers_reads_it_as_it_is(transformers_greedy):
    folder = demo.demo_checkpoint("bf16")
    llm = LLM(str(folder), use_tqdm_on_load=False, num_gpu_blocks_override=50)
    prompt = llm.get_tokenizer().encode("345+678=")
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    assert [output.outputs[0].token_ids] == transformers_greedy(folder, [prompt], 24)
    llm.shutdown()


def test_the_command_shows_answers_experts_and_how_to_serve(capsys):
    code, (out, err) = main(["demo", "--form", "awq", "--num-gpu-blocks-override", "60"]), capsys.readouterr()
    assert code == 0 and "toy model" in err
    assert out.count("expected:") == 3 and "3 of 3 right" in out and "not the same" not in out
    assert "model.layers.2" in out and out.endswith("Serve it:  nybble serve nybble-demo-awq\n")


def test_the_command_takes_no_other_model(capsys):
    assert main(["demo", "/somewhere"]) == 2 and "model of its own" in capsys.readouterr().err
