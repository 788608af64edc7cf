"""The command from its flags to its files and exit code."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nybble import LLM, SamplingParams
from nybble.bench.eval.html import to_html
from nybble.bench.eval.report import from_json, to_json
from nybble.engine.cli import main
from nybble.plugins.errors import UsageError

ENGINE = ["--device", "cpu", "--num-gpu-blocks-override", "80", "--no-use-tqdm-on-load"]
PROMPT = "one two "


@pytest.fixture(scope="module")
def spoiled(fp8) -> Path:
    return fp8({"model.layers.1.block_sparse_moe.experts.5.w2.weight_scale": 2.0})[0]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    lines = [{"task": "<plain>", "prompt": PROMPT, "answer": "& <b>"},
             {"task": "chat", "messages": [{"role": "user", "content": "hi"}], "answer": "ho"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def told(spoiled, reference, questions, tmp_path_factory):
    """(exit code, JSON file, HTML file) of a whole run."""
    out = tmp_path_factory.mktemp("out")
    code = main(["eval", str(spoiled), "--reference", str(reference), "--tasks", str(questions), "--json",
                 str(out / "deep" / "r.json"), "--html", str(out / "r.html"), "--max-kl", "1e-9", *ENGINE])
    return code, out / "deep" / "r.json", out / "r.html"


def test_json(told, spoiled, reference):
    code, path, _ = told
    report = from_json(path.read_bytes())
    assert code == 1 and "KL" in report.failed[0] and report.comparison is not None
    assert to_json(report) == path.read_bytes()
    assert (report.model.quantization, report.reference and report.reference.quantization) == ("fp8", None)
    assert report.model.sha256 == {
        "model.safetensors": hashlib.sha256((spoiled / "model.safetensors").read_bytes()).hexdigest()}
    assert {"torch", "nybble", "python"} <= report.libraries.keys() and report.command.startswith("nybble eval ")
    assert report.comparison.outliers[0].place.startswith("layer 1 expert 5")
    assert sum(report.model.schemes.values()) == len(report.comparison.matrices)
    with pytest.raises(UsageError, match="schema"):
        from_json(b'{"schema": 99}')
    with pytest.raises(UsageError, match="no report"):
        from_json(b'{"schema": 1}')


def test_answers_are_the_engines(told, reference):
    """What is reported as got is what LLM gives."""
    llm = LLM(str(reference), device="cpu", num_gpu_blocks_override=80, use_tqdm_on_load=False)
    answers = len(llm.get_tokenizer().encode("& <b>", add_special_tokens=False)) + 8
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=answers), use_tqdm=False)
    llm.shutdown()
    plain, chat = from_json(told[1].read_bytes()).tasks
    assert plain.reference is not None and (plain.reference.right, plain.reference.total, chat.model.total) == (0, 1, 1)
    assert plain.reference.wrong[0].got == output.outputs[0].text and plain.model.wrong[0].expected == "& <b>"


def test_html_is_well_formed_and_of_its_own(told):
    text = told[2].read_text()
    page = ElementTree.fromstring(text.split("\n", 1)[1])
    tags = {element.tag for element in page.iter()}
    assert {"svg", "rect", "table"} <= tags and not tags & {"script", "link", "img", "iframe", "object", "image"}
    assert not re.search(r"https?:|//|url\(|@import|\bon\w+=|(src|href)=", text)
    words = " ".join(page.itertext())
    assert "layer 1 expert 5" in words and "& <b>" in words and "<plain>" in words and "inf" in words


def test_terminal(spoiled, reference, questions, capsys):
    command = ["eval", str(spoiled), "--reference", str(reference), "--tasks", str(questions), *ENGINE]
    assert main([*command, "--max-kl", "1e9", "--max-drop", "0", "--no-hash"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"suspicious: layer 1 expert 5 w2: -?\d.\d dB, others \d\d.\d dB median \(weights\)", line)
               for line in lines)
    worst = next(i for i, line in enumerate(lines) if line.startswith("worst"))
    assert lines[worst + 1].startswith("model.layers.1.block_sparse_moe.experts.5.w2 ")


def test_identical_and_text_alone(reference, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    command = ["eval", str(reference), "--reference", str(reference), "--tasks", "none", "--text",
               str(tmp_path / "t.txt"), "--window", "40", "--json", str(tmp_path / "r.json"), *ENGINE]
    assert main([*command, "--max-kl", "0"]) == 0
    report = from_json((tmp_path / "r.json").read_bytes())
    assert report.comparison is not None and report.comparison.divergence[0].kl_max == 0 and not report.tasks
    assert "inf dB" in capsys.readouterr().out and "//" not in to_html(report)


def test_without_a_reference(reference, questions, capsys):
    assert main(["eval", str(reference), "--tasks", str(questions), *ENGINE]) == 0
    assert "0.0 % (0/2)" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "says"), [
    (["--max-kl", "1"], "--max-kl needs"), (["--max-drop", "1"], "--max-drop needs"), (["--text", "x"], "--text needs"),
    (["--tasks", "none"], "--tasks none needs"), (["--reference", "R", "--tasks", "none"], "--tasks none needs"),
    (["--reference", "R", "--no-reference-tasks", "--max-drop", "1"], "--max-drop needs"),
    (["--tasks", "no/such.jsonl"], "cannot read no/such.jsonl"), (["--count", "0"], "--count must be at least 1"),
    (["--split", "all"], "held-out, train, both"),
])
def test_flags_that_cannot_be_meant(flags, says, reference, capsys):
    assert main(["eval", str(reference), *flags, *ENGINE]) == 2
    assert says in capsys.readouterr().err


def test_mismatched_pair(reference, make_checkpoint, capsys):
    assert main(["eval", str(make_checkpoint("Llama")), "--reference", str(reference), *ENGINE]) == 2
    error = capsys.readouterr().err
    assert "cannot be compared" in error and "LlamaForCausalLM and MixtralForCausalLM" in error
