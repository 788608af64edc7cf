"""The load report: layers that differ in their number alone are one row, and each set of reasons is told once."""

from __future__ import annotations

import json

import msgspec
import pytest

from nybble.engine.layer_report import AttentionReport, LayerReport, render, summary

WHY = {"cpu_int4": "runs on CPU, not on cuda", "triton": "tiles goes first (priority 9 over 1)"}


def layer(name: str, *, scheme: str = "int4 g128", kernel: str = "tiles", size: int = 1_500_000,
          shape: tuple[int, int] = (512, 2048), refusals: dict[str, str] | None = None) -> LayerReport:
    return LayerReport(layer=name, scheme=scheme, kernel=kernel, shape=shape, bytes=size,
                       refusals=WHY if refusals is None else refusals)


def decoder(number: int) -> list[LayerReport]:
    return [layer(f"model.layers.{number}.mlp.gate_proj+up_proj", size=2_000_000),
            layer(f"model.layers.{number}.mlp.down_proj", shape=(2048, 512))]


HEAD = layer("lm_head", scheme="bfloat16", kernel="torch", size=4_250_000, shape=(32000, 64), refusals={})


def rows(table: str) -> dict[str, list[str]]:
    """The table's lines by their first word."""
    lines = table.split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split() for line in lines}


def test_layers_of_one_kind_are_one_row():
    table = render([*decoder(0), *decoder(1), HEAD, *decoder(2)], None, "table")
    found = rows(table)
    assert list(found) == ["layers", "lm_head", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.gate_proj+up_proj",
                           "total"]
    assert found["lm_head"] == ["lm_head", "32000", "x", "64", "bfloat16", "torch", "4.25"]
    assert found["model.layers.*.mlp.down_proj"][1:] == ["x3", "2048", "x", "512", "int4", "g128", "tiles", "4.50"]
    assert found["model.layers.*.mlp.gate_proj+up_proj"][-1] == "6.00"
    assert found["total"] == ["total", "14.75"]


def test_each_set_of_reasons_is_told_once():
    table = render([*decoder(0), *decoder(1), HEAD], None, "table")
    assert table.endswith("""

why tiles runs int4 g128 (model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj+up_proj):
  cpu_int4: runs on CPU, not on cuda
  triton: tiles goes first (priority 9 over 1)""")
    assert table.count("why ") == 1


@pytest.mark.parametrize("change", [
    dict(scheme="int8"), dict(kernel="reference"), dict(refusals={"triton": "not this one"}), dict(shape=(8, 8)),
    dict(refusals={"cpu_int4": "runs on CPU, not on cuda", "other": WHY["triton"]}),
], ids=["scheme", "kernel", "reasons", "shape", "names of who refuses"])
def test_a_layer_that_differs_has_a_row_of_its_own(change):
    """Also where one layer of many fell back to a slower kernel: the row that matters must not hide."""
    name = "model.layers.{}.mlp.down_proj".format
    table = render([layer(name(0)), layer(name(1)), layer(name(2), **change)], None, "table")
    lines = table.split("\n\n")[0].splitlines()[1:-1]
    assert sorted("x2" in line.split() for line in lines) == [False, True], table
    if "shape" not in change:
        assert table.count("why ") == 2


def test_no_layers():
    assert rows(render([], None, "table"))["total"] == ["total", "0.00"]
    assert json.loads(render([], None, "json")) == {"layers": [], "attention": None}


def test_json_holds_every_layer():
    layers = [*decoder(0), *decoder(1), HEAD]
    text = render(layers, None, "json")
    assert msgspec.convert(json.loads(text)["layers"], list[LayerReport]) == layers
    assert json.loads(text)["layers"][4] == {"layer": "lm_head", "scheme": "bfloat16", "kernel": "torch",
                                             "shape": [32000, 64], "bytes": 4_250_000, "refusals": {}}
    assert len(text.splitlines()) > 40, "indented, to be read"


def test_a_summary_counts_layers_by_format_and_kernel():
    told = summary([*decoder(0), HEAD, *decoder(1)])
    assert told == "4 int4 g128 by tiles (7.0 MB), 1 bfloat16 by torch (4.2 MB)"
    assert summary([]) == ""


ATTENTION = AttentionReport(
    backend="triton", layers=32, cache="bfloat16", parts={"prompts": "triton, as prompt_attention has no window"},
    refusals={"flash": "FlashInfer is not installed", "torch": "triton goes first (priority 10 over 0)"})


def test_attention_has_a_block_of_its_own():
    table = render([HEAD], ATTENTION, "table")
    assert table.endswith("""

attention of 32 layers by triton, cache in bfloat16; prompts: triton, as prompt_attention has no window
  flash: FlashInfer is not installed
  torch: triton goes first (priority 10 over 0)""")
    assert msgspec.convert(json.loads(render([HEAD], ATTENTION, "json"))["attention"], AttentionReport) == ATTENTION
