"""GPTQ: codes packed by an obvious loop come out again, whatever the bits, order, zeros and range of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.plugins.errors import CheckpointError
from nybble.quant import LayerShape, Linear, Part, Stored
from nybble.quant.gptq import GPTQConfig, GPTQMethod

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
NAME = "model.layers.0.mlp.down_proj"


def shape_of(inputs: int, *outputs: int) -> LayerShape:
    parts = tuple(Part(name=f"p{i}", size=size) for i, size in enumerate(outputs))
    return LayerShape(in_features=inputs, parts=parts)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[V, C] -> [V * bits / 32, C]: column by column one number, cut into words from its low end."""
    columns = []
    for column in codes.T.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(column))
        words = [number >> (32 * w) & 0xFFFFFFFF for w in range(len(column) * bits // 32)]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[W, C] -> [W * 32 / bits, C]: each column of words is one number again, and codes are its digits."""
    columns = []
    for column in words.T.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(column))
        columns.append([number >> (i * bits) & ((1 << bits) - 1) for i in range(len(column) * 32 // bits)])
    return torch.tensor(columns, dtype=torch.uint8).T


def made_up(method: GPTQMethod, inputs: int, out: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored tensors of one matrix and what they stand for [out, inputs], by the definition."""
    rng = torch.Generator().manual_seed(seed)
    group, top = method.group or inputs, 1 << method.bits
    groups = -(-inputs // group)
    codes = torch.randint(top, (inputs, out), generator=rng)
    zeros = torch.full((groups, out), top // 2) if method.sym else torch.randint(top, (groups, out), generator=rng)
    order = torch.arange(inputs) // group
    if method.act_order:
        order = order[torch.randperm(inputs, generator=rng)]
    scales = (torch.rand(groups, out, generator=rng) + 0.1).to(method.scales)
    expected = (codes - zeros[order]).float() * scales[order].float()
    stored = zeros if method.v2 else (zeros - 1) % top
    weights = {"qweight": pack(codes, method.bits), "qzeros": pack(stored.T, method.bits).T.contiguous(),
               "scales": scales, "g_idx": order.int()[None]}
    return weights, expected.T


def found_for(bits: int = 4, inputs: int = 64, out: int = 32, group: int = 32, dtype=torch.float16) -> dict:
    groups = -(-inputs // group)
    return {"qweight": Stored(torch.int32, (inputs * bits // 32, out)), "scales": Stored(dtype, (groups, out)),
            "qzeros": Stored(torch.int32, (groups, out * bits // 32)), "g_idx": Stored(torch.int32, (inputs,))}


def method_for(config: dict, found: dict | None, name: str = NAME) -> GPTQMethod | None:
    return GPTQConfig.from_checkpoint(config).method_for(name, shape_of(64, 32), found)


METHODS = st.builds(
    GPTQMethod, bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([None, 32, 64, 40]), sym=st.booleans(),
    v2=st.booleans(), act_order=st.booleans(), scales=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    optional=st.just(frozenset({"g_idx", "qzeros"})),
).filter(lambda method: not (method.act_order and method.group is None))


@settings(deadline=None, max_examples=60)
@given(method=METHODS, inputs=st.sampled_from([32, 96, 128]), out=st.sampled_from([32, 64, 96]), data=st.data())
def test_round_trip(method, inputs, out, data):
    weights, expected = made_up(method, inputs, out, data.draw(st.integers(0, 99)))
    weights = method.after_load(weights, shape_of(inputs, out))
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    assert torch.equal(method.dequant(weights), expected)
    assert torch.equal(method.dequant_rows(weights, start, stop), expected[start:stop])
    assert ("qzeros" in weights) == (not method.sym)
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.apply(weights, x, torch.ones(out)), x @ expected.T + 1, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym, v2", [(True, False), (False, False), (False, True)], ids=["sym", "v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_the_matrix_that_kernels_read(bits, sym, v2, act_order):
    method = GPTQMethod(bits=bits, group=32, sym=sym, v2=v2, act_order=act_order, optional=frozenset({"g_idx"}))
    stored, _ = made_up(method, 96, 64, bits)
    matrix = method.matrix(method.after_load(stored, shape_of(96, 64)))
    assert torch.equal(matrix.codes(0, 64), unpack(stored["qweight"], bits).T)
    assert torch.equal(matrix.codes(9, 42), matrix.codes(0, 64)[9:42])
    assert torch.equal(matrix.scales, stored["scales"].T)
    if sym:
        assert matrix.zeros is None and matrix.zero == 1 << (bits - 1)
    else:
        zeros = unpack(stored["qzeros"].T, bits)
        assert torch.equal(matrix.zeros.int(), (zeros.int() + (0 if v2 else 1)) % (1 << bits))
    assert torch.equal(matrix.groups, stored["g_idx"][0]) if act_order else matrix.groups is None
    assert (matrix.rows, matrix.columns, matrix.scheme.act_order) == (64, 96, act_order)


@pytest.mark.parametrize("act_order", [False, True])
def test_order_is_kept_only_where_it_says_something(act_order):
    method = GPTQMethod(bits=4, group=32, act_order=act_order, optional=frozenset({"g_idx"}))
    weights, _ = made_up(method, 64, 32, 0)
    kept = method.after_load(weights, shape_of(64, 32))
    assert kept.get("g_idx", torch.empty(0)).shape == ((64,) if act_order else (0,))
    weights["g_idx"] = torch.arange(64).int()[None] // 32
    assert "g_idx" not in method.after_load(weights, shape_of(64, 32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parts_load_into_their_place(bits):
    """Two matrices in one layer are the two apart, one below the other."""
    shape = shape_of(64, 32, 64)
    method = GPTQMethod(bits=bits, group=32, sym=False, optional=frozenset({"g_idx", "qzeros"}))
    layer = Linear("model", shape, method, dtype=torch.float32, device=torch.device("cpu"))
    parts = {part.name: made_up(method, 64, part.size, i) for i, part in enumerate(shape.parts)}
    for slot in layer.slots():
        _, part, tensor = slot.name.split(".")
        slot.target.copy_(parts[part][0][tensor].squeeze(0) if tensor == "g_idx" else parts[part][0][tensor])
    layer.after_load()
    assert torch.equal(method.dequant(layer.weights), torch.cat([expected for _, expected in parts.values()]))


@pytest.mark.parametrize("change, message", [
    ({"scales": torch.tensor(0.0)}, "scales holds values.*\n.*1 of 128 are .* as 0.0"),
    ({"scales": torch.tensor(float("nan"))}, "scales holds values.*\n.* as nan"),
    ({"scales": torch.tensor(float("inf"))}, "scales holds values.*\n.* as inf"),
    ({"g_idx": torch.tensor(2)}, "g_idx names a group that does not exist\n.*0 to 2\n.*0 to 1"),
    ({"g_idx": torch.tensor(-1)}, "g_idx names a group that does not exist"),
    ({"g_idx": torch.tensor(0)}, "desc_act false, but inputs are out of order"),
    ({"bias": torch.tensor(0.5)}, "p0, p1: a bias is stored"),
])
def test_values_that_cannot_be_meant(change, message):
    method = GPTQMethod(bits=4, group=32, optional=frozenset({"g_idx", "qzeros", "bias"}))
    weights, _ = made_up(method, 64, 64, 0)
    weights |= {"g_idx": weights["g_idx"].repeat(2, 1), "bias": torch.zeros(64)}
    shape = shape_of(64, 32, 32)
    assert set(method.after_load(dict(weights), shape)) == {"qweight", "scales"}
    for name, value in change.items():
        weights[name][(1, 34) if weights[name].ndim == 2 else 34] = value
    with pytest.raises(CheckpointError, match=message):
        method.after_load(weights, shape)


@pytest.mark.parametrize("config, found, expected", [
    ({}, {}, {}),
    ({"bits": 8}, {"bits": 8}, {"bits": 8}),
    ({"bits": 3}, {"bits": 3}, {"bits": 3, "fusable": False}),
    ({"group_size": -1}, {"group": 64}, {"group": None}),
    ({"group_size": 128}, {"group": 64}, {"group": None}),
    ({"sym": False}, {}, {"sym": False}),
    ({"sym": None}, {}, {"sym": True}),
    ({"desc_act": True}, {}, {"act_order": True, "fusable": False}),
    ({"desc_act": True, "group_size": -1}, {"group": 64}, {"act_order": False, "fusable": True}),
    ({"desc_act": None}, {}, {"act_order": True}),
    ({"checkpoint_format": "gptq_v2"}, {}, {"v2": True}),
    ({"format": "gptq_v2"}, {}, {"v2": True}),
    ({"checkpoint_format": None, "quant_method": None}, {}, {"v2": False}),
    ({}, {"dtype": torch.bfloat16}, {"scales": torch.bfloat16}),
    ({"dynamic": {r".*\.down_proj": {"bits": 8, "group_size": 64, "mse": 2.0}}}, {"bits": 8, "group": 64},
     {"bits": 8, "group": None}),
    ({"dynamic": {r"+:.*\.down_proj": {"desc_act": True, "sym": False}}}, {}, {"act_order": True, "sym": False}),
    ({"dynamic": {r".*\.up_proj": {"bits": 8}}}, {}, {"bits": 4}),
])  # fmt: skip
def test_config(config, found, expected):
    method = method_for(CONFIG | config, found_for(**found))
    assert {name: getattr(method, name) for name in expected} == expected
    assert method.scheme.bits == method.bits and method.scheme.zero_point == (not method.sym)


@pytest.mark.parametrize("config, name, quantized", [
    ({}, NAME, True), ({}, "lm_head", False), ({"lm_head": True}, "lm_head", True),
    ({"dynamic": {r"-:.*\.mlp": {}}}, NAME, False),
    ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, NAME, False),
    ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, NAME, True),
])  # fmt: skip
def test_made_up_weights_follow_the_config(config, name, quantized):
    method = method_for(CONFIG | config, None, name)
    assert (method is not None) == quantized
    if method:
        layer = Linear("model", shape_of(64, 32), replace(method, act_order=True), dtype=torch.float32,
                       device=torch.device("cpu"))
        for slot in layer.slots():
            slot.target.fill_(0 if "g_idx" in slot.name else 1)
        layer.after_load()
        assert layer(torch.ones(2, 64)).shape == (2, 32)


@pytest.mark.parametrize("name", [NAME, "lm_head"])
@pytest.mark.parametrize("config", [{}, {"dynamic": {"-:.*nothing": {}}}, {"modules_in_block_to_quantize": ["x"]}])
def test_what_is_stored_decides(name, config):
    assert method_for(CONFIG | config, {"weight": Stored(torch.float16, (32, 64))}, name) is None
    assert method_for(CONFIG | config, found_for(), name).bits == 4


WITHOUT = {name: {k: v for k, v in found_for().items() if k != name} for name in found_for()}


@pytest.mark.parametrize("config, found, message", [
    ({"bits": 8}, found_for(4), r"8-bit GPTQ, so qweight \[16, 32\]; .*qweight int32 \[8, 32\].*\n.*fits 4-bit GPTQ"),
    ({}, found_for(3), "4-bit GPTQ, so .*\n.*fits 3-bit GPTQ"),
    ({"desc_act": True}, {"qweight": Stored(torch.int32, (64, 4)), "scales": Stored(torch.float16, (2, 32))},
     r"4-bit GPTQ, so .*\[64, 4\].*\n.*fits 4-bit AWQ"),
    ({}, found_for(4, inputs=96), "fits neither GPTQ nor AWQ of 64 inputs"),
    ({"group_size": -1}, found_for(), r"group size -1, so 1 rows.*\[2, 32\]\n.*fit group size 32"),
    ({}, found_for(group=16), "group size 32, so 2 rows.*\n.*fit group size 16"),
    ({"dynamic": {"-:.*down": {}}}, found_for(), "unquantized, by the rule '.*down'; stored: .*qweight"),
    ({}, {}, "quantized, so a qweight .*; stored: nothing"),
    ({}, {"bias": Stored(torch.float16, (32,))}, r"quantized, so a qweight .*; stored: bias float16 \[32\]"),
    ({"sym": False}, WITHOUT["qzeros"], "has no qzeros"),
    ({"desc_act": True}, WITHOUT["g_idx"], "has no g_idx"),
    ({}, WITHOUT["scales"], "has no scales"),
    ({}, found_for(dtype=torch.int32), "scales must be float32"),
])  # fmt: skip
def test_contradictions(config, found, message):
    with pytest.raises(CheckpointError, match=message):
        method_for(CONFIG | config, found)


@pytest.mark.parametrize("config, message", [
    ({"bits": 5}, "bits 5 is not implemented\n.*2, 3, 4, 8"),
    ({"bits": None}, "has no bits"),
    ({"bits": "4"}, "bits must be int\n.*'4'"),
    ({"group_size": 0}, "group_size must be positive"),
    ({"sym": 1}, "sym must be bool"),
    *[({"checkpoint_format": name}, f"checkpoint_format '{name}' is not implemented\n.*gptq, gptq_v2")
      for name in ("marlin", "bitblas", "gptq_p", "gemm")],
    ({"is_marlin_format": True}, "'marlin' is not implemented"),
    ({"pack_dtype": "int8"}, "pack_dtype 'int8' is not implemented"),
    ({"dynamic": {"x": 4}}, "dynamic rule 'x' must map to settings"),
    ({"dynamic": {"x": {"bits": 5}}}, "bits 5 is not implemented"),
    ({"dynamic": {"(": {}}}, "no regular expression"),
])  # fmt: skip
def test_configs_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        GPTQConfig.from_checkpoint(CONFIG | config)


@pytest.mark.parametrize("bits, inputs, out, message", [
    (4, 60, 32, "packs 8 inputs together\n.*60"), (3, 64, 40, "packs 32 outputs together\n.*40"),
])  # fmt: skip
def test_sizes_refused(bits, inputs, out, message):
    with pytest.raises(CheckpointError, match=message):
        GPTQConfig.from_checkpoint(CONFIG | {"bits": bits}).method_for(NAME, shape_of(inputs, out), None)
