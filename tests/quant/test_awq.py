"""AWQ: codes interleaved by an obvious loop come out again, in either spelling of the config."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.plugins.errors import CheckpointError
from nybble.quant import LayerShape, Linear, Part, Stored
from nybble.quant.awq import AWQConfig, AWQMethod

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
NAME = "model.layers.0.mlp.gate_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the output in each nibble of a word, lowest first, as AutoAWQ packs


def shape_of(inputs: int, *outputs: int) -> LayerShape:
    parts = tuple(Part(name=f"p{i}", size=size) for i, size in enumerate(outputs))
    return LayerShape(in_features=inputs, parts=parts)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[R, N] -> [R, N / 8]."""
    rows = []
    for row in codes.tolist():
        words = [sum(row[c + ORDER[i]] << (4 * i) for i in range(8)) for c in range(0, len(row), 8)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def made_up(method: AWQMethod, inputs: int, out: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored tensors of one matrix and what they stand for [out, inputs], by the definition."""
    rng = torch.Generator().manual_seed(seed)
    group = method.group or inputs
    codes = torch.randint(16, (inputs, out), generator=rng)
    zeros = torch.randint(16, (inputs // group, out), generator=rng)
    scales = (torch.rand(inputs // group, out, generator=rng) + 0.1).to(method.scales)
    order = torch.arange(inputs) // group
    expected = (codes - zeros[order]).float() * scales[order].float()
    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, expected.T


def found_for(inputs: int = 64, out: int = 32, group: int = 32, dtype=torch.float16) -> dict:
    groups = inputs // group
    return {"qweight": Stored(torch.int32, (inputs, out // 8)), "qzeros": Stored(torch.int32, (groups, out // 8)),
            "scales": Stored(dtype, (groups, out))}


def method_for(config: dict, found: dict | None, name: str = NAME) -> AWQMethod | None:
    return AWQConfig.from_checkpoint(config).method_for(name, shape_of(64, 32), found)


@settings(deadline=None, max_examples=40)
@given(group=st.sampled_from([None, 32, 64, 128]), scales=st.sampled_from([torch.float16, torch.bfloat16]),
       out=st.sampled_from([8, 40, 64]), data=st.data())
def test_round_trip(group, scales, out, data):
    method = AWQMethod(group=group, scales=scales)
    inputs = data.draw(st.sampled_from([128, 256]))
    weights, expected = made_up(method, inputs, out, data.draw(st.integers(0, 99)))
    weights = method.after_load(weights, shape_of(inputs, out))
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    assert torch.equal(method.dequant(weights), expected)
    assert torch.equal(method.dequant_rows(weights, start, stop), expected[start:stop])
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.apply(weights, x, torch.ones(out)), x @ expected.T + 1, atol=1e-3, rtol=1e-5)


def test_the_matrix_that_kernels_read():
    method = AWQMethod(group=32)
    stored, _ = made_up(method, 64, 40, 0)
    matrix = method.matrix(method.after_load(stored, shape_of(64, 40)))

    def code(words: torch.Tensor, row: int, output: int) -> int:
        return int(words[row, output // 8]) >> 4 * ORDER.index(output % 8) & 15

    for codes, words, found in [(64, "qweight", matrix.codes(0, 40)), (2, "qzeros", matrix.zeros)]:
        assert found.tolist() == [[code(stored[words], row, n) for row in range(codes)] for n in range(40)]
    assert torch.equal(matrix.codes(5, 23), matrix.codes(0, 40)[5:23])
    assert torch.equal(matrix.scales, stored["scales"].T)
    assert (matrix.rows, matrix.columns, matrix.groups, matrix.scale_rows) == (40, 64, None, None)


def test_parts_load_into_their_place():
    """Two matrices in one layer are the two apart, one below the other."""
    shape, method = shape_of(64, 24, 40), AWQMethod(group=32)
    layer = Linear("model", shape, method, dtype=torch.float32, device=torch.device("cpu"))
    parts = {part.name: made_up(method, 64, part.size, i) for i, part in enumerate(shape.parts)}
    for slot in layer.slots():
        _, part, tensor = slot.name.split(".")
        slot.target.copy_(parts[part][0][tensor])
    layer.after_load()
    assert torch.equal(method.dequant(layer.weights), torch.cat([expected for _, expected in parts.values()]))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_meant(value):
    method = AWQMethod(group=32)
    weights, _ = made_up(method, 64, 32, 0)
    weights["scales"][1, 26] = value
    with pytest.raises(CheckpointError, match=f"scales holds values.*\n.*1 of 64 .* as {value}"):
        method.after_load(weights, shape_of(64, 24, 8))


OLD = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}


@pytest.mark.parametrize("config, found, group, scales", [
    (CONFIG, {}, 32, torch.float16),
    (OLD, {}, 32, torch.float16),
    (CONFIG, {"dtype": torch.bfloat16}, 32, torch.bfloat16),
    (CONFIG | {"group_size": -1}, {"group": 64}, None, torch.float16),
    (CONFIG | {"group_size": 64}, {"group": 64}, None, torch.float16),
    (CONFIG | {"version": None, "zero_point": None, "checkpoint_format": "gemm"}, {}, 32, torch.float16),
    (CONFIG | {"modules_to_not_convert": ["gate"]}, {}, 32, torch.float16),
])  # fmt: skip
def test_config(config, found, group, scales):
    method = method_for(config, found_for(**found))
    assert method == AWQMethod(group=group, scales=scales)
    assert (method.scheme.bits, method.scheme.group, method.scheme.zero_point) == (4, group, True)


@pytest.mark.parametrize("config, name, quantized", [
    ({}, NAME, True), ({}, "lm_head", False), ({"lm_head": True}, "lm_head", True),
    ({"modules_to_not_convert": ["mlp"]}, NAME, False), ({"modules_to_not_convert": ["gate"]}, NAME, True),
])  # fmt: skip
def test_made_up_weights_follow_the_config(config, name, quantized):
    assert (method_for(CONFIG | config, None, name) is not None) == quantized


@pytest.mark.parametrize("name", [NAME, "lm_head"])
def test_what_is_stored_decides(name):
    assert method_for(CONFIG, {"weight": Stored(torch.float16, (32, 64))}, name) is None
    assert method_for(CONFIG, found_for(), name) == AWQMethod(group=32)


GPTQ_FOUND = {"qweight": Stored(torch.int32, (8, 32)), "scales": Stored(torch.float16, (2, 32)),
              "g_idx": Stored(torch.int32, (64,))}


@pytest.mark.parametrize("config, found, message", [
    ({}, GPTQ_FOUND, r"AWQ \(gemm\), so qweight \[64, 4\]; .*\[8, 32\].*\n.*fits GPTQ"),
    ({}, found_for(inputs=96), r"so qweight \[64, 4\]; .*\[96, 4\].*\n.*fits no AWQ"),
    ({"group_size": 64}, found_for(), "group size 64, so 1 rows.*\n.*fit group size 32"),
    ({"modules_to_not_convert": ["mlp"]}, found_for(), "unquantized, by the rule 'mlp'; stored: .*qweight"),
    ({}, {}, "quantized, so a qweight .*; stored: nothing"),
    ({}, {"qweight": found_for()["qweight"]}, "has no scales and no qzeros"),
    ({}, found_for(dtype=torch.float64), "scales must be float32"),
    ({"group_size": 48}, None, "whole groups of 48 inputs\n.*64"),
])  # fmt: skip
def test_contradictions(config, found, message):
    with pytest.raises(CheckpointError, match=message):
        method_for(CONFIG | config, found)


def test_outputs_must_fill_words():
    with pytest.raises(CheckpointError, match=r"packs 8 outputs together\n.*12"):
        AWQConfig.from_checkpoint(CONFIG).method_for(NAME, shape_of(64, 12), None)


@pytest.mark.parametrize("config, message", [
    *[({"version": name}, f"version '{name.lower()}' is not implemented\n.*gemm")
      for name in ("gemv", "GEMV_fast", "marlin", "exllama", "llm-awq")],
    ({"checkpoint_format": "gemv"}, "checkpoint_format 'gemv' is not implemented"),
    ({"bits": 8}, "bits 8 is not implemented\n.*4"),
    ({"bits": None}, "has no bits or w_bit"),
    ({"group_size": True}, "group_size must be int"),
    ({"group_size": -2}, "group_size must be positive"),
    ({"zero_point": False}, "zero_point False is not implemented"),
    ({"modules_to_not_convert": "gate"}, "modules_to_not_convert must be list"),
])  # fmt: skip
def test_configs_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        AWQConfig.from_checkpoint(CONFIG | config)
