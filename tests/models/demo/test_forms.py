"""The gate of every quantization method: each shipped form of the demo answers as the 16-bit one does."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nybble.engine.cli import main
from nybble.engine.demo import demo_checkpoint

CPU = ["--device", "cpu", "--num-gpu-blocks-override", "4000"]
REFERENCE = ["--reference", "nybble-demo-bf16", "--no-reference-tasks", *CPU]
MAX_DROP = 1.0  # points of exact match over all tasks
# Mean divergence from the 16-bit form, in nats per answered token: five times what each was when it was made.
MAX_KL = {"fp8": 1e-4, "gptq": 1e-3, "awq": 2e-3}


def right(told: dict) -> int:
    """Answers of the model under test, of 50 questions of each of six tasks that it was not trained on."""
    return sum(task["model"]["right"] for task in told["tasks"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> int:
    """What the 16-bit form has right; it answers once for all forms."""
    report = tmp_path_factory.mktemp("reference") / "report.json"
    assert main(["eval", "nybble-demo-bf16", *CPU, "--count", "50", "--json", str(report)]) == 0
    found = right(json.loads(report.read_text()))
    assert found >= 0.98 * 300
    return found


@pytest.mark.parametrize("form", MAX_KL)
def test_a_form_keeps_its_score(form, reference, tmp_path):
    report = tmp_path / "report.json"
    code = main(["eval", f"nybble-demo-{form}", *REFERENCE, "--count", "50", "--max-tokens", "4096",
                 "--json", str(report), "--max-kl", str(MAX_KL[form])])
    told = json.loads(report.read_text())
    assert code == 0, told["failed"]
    assert right(told) >= reference - 0.01 * MAX_DROP * 300
    assert told["model"]["toy_model"] and told["model"]["quantization"]


def test_a_wrong_scale_in_one_expert_is_named(tmp_path, capsys):
    folder, wrong = tmp_path / "wrong", "model.layers.1.block_sparse_moe.experts.5.w2"
    shutil.copytree(demo_checkpoint("gptq"), folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{wrong}.scales"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = []
    for model in (str(folder), "nybble-demo-gptq"):
        code = main(["eval", model, *REFERENCE, "--count", "5", "--max-tokens", "2048",
                     "--json", str(tmp_path / "report.json")])
        told.append(json.loads((tmp_path / "report.json").read_text())["comparison"]["outliers"])
        assert code == 0
    assert any("experts.5" in json.dumps(outlier) for outlier in told[0]) and told[1] == []
    assert wrong in capsys.readouterr().out.replace("\n", "")
