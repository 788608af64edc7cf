"""compressed-tensors: packed and 8-bit weights by every strategy, groups and targets, input rounding, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.plugins.errors import CheckpointError
from nybble.quant import LayerShape, Linear, LinearMethod, Part, Stored
from nybble.quant.compressed_tensors import CompressedTensorsConfig
from nybble.quant.pack_quantized import unpack

F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32
Tensors = dict[str, torch.Tensor]


def config(form: str, inputs: dict | None = None, **weights) -> dict:
    """A quantization_config with one group for every Linear."""
    kind = "float" if form == "float-quantized" else "int"
    defaults = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False, "observer": "minmax"}
    inputs = inputs and {"num_bits": 8, "type": kind, "symmetric": True, **inputs}
    group = {"targets": ["Linear"], "weights": defaults | weights, "input_activations": inputs, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}


def layer(columns: int, *sizes: int) -> LayerShape:
    return LayerShape(in_features=columns, parts=tuple(Part(name="abcd"[i], size=n) for i, n in enumerate(sizes)))


def method_for(settings: dict, columns: int, rows: int, stored: Tensors | None, name: str = "m.a"):
    found = None if stored is None else {k: Stored(v.dtype, tuple(v.shape)) for k, v in stored.items()}
    return CompressedTensorsConfig.from_checkpoint(settings).method_for(name, layer(columns, rows), found)


def load(settings: dict, columns: int, sizes: list[int], *parts: Tensors) -> Linear:
    (method,) = {method_for(settings, columns, n, part) for n, part in zip(sizes, parts)}
    linear = Linear("m", layer(columns, *sizes), method, dtype=F32, device=torch.device("cpu"))
    for slot in linear.slots():
        _, part, name = slot.name.split(".")
        value = parts["abcd".index(part)][name]
        assert value.shape == slot.target.shape and value.dtype in slot.sources
        slot.target.copy_(value)
    linear.after_load()
    return linear


def dequant(linear: Linear) -> torch.Tensor:
    return linear.method.dequant(linear.weights)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [R, C] to words [R, ceil(C / pack)], low bits first, one bit of arithmetic at a time."""
    per = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // per] |= codes[:, column].long() << (bits * (column % per))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def packed(rows: int, columns: int, bits: int, group: int | None, *, zeros: bool = False, order: bool = False,
           scale_dtype: torch.dtype = BF16, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """What a file stores of a random matrix, and the matrix."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group) if group else 1
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).to(scale_dtype)
    zero = torch.randint(1 << bits, (rows, groups), generator=generator)
    index = torch.arange(columns) // (group or columns)
    stored = {"weight_packed": pack(codes, bits), "weight_scale": scale,
              "weight_shape": torch.tensor([rows, columns])}
    if order:
        index = index[torch.randperm(columns, generator=generator)]
        stored["weight_g_idx"] = index.int()
    if zeros:
        stored["weight_zero_point"] = pack(zero.T, bits).T
    zero = zero[:, index] if zeros else torch.tensor(1 << (bits - 1))
    return stored, (codes - zero).float() * scale.float()[:, index]


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_unpack_undoes_packing(bits, rows, columns, seed):
    codes = torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows, columns, group", [(40, 64, 32), (33, 100, 32), (9, 13, None), (1, 8, 8)])
def test_packed(bits, zeros, rows, columns, group):
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    stored, expected = packed(rows, columns, bits, group, zeros=zeros)
    linear = load(config("pack-quantized", num_bits=bits, symmetric=not zeros, **strategy), columns, [rows], stored)
    assert torch.equal(dequant(linear), expected)
    assert torch.equal(linear.method.dequant_rows(linear.weights, rows // 2, rows), expected[rows // 2 :])
    assert linear.weights["weight_packed"].dtype == I32
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(linear(x), x @ expected.T)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
def test_fused_parts_of_unaligned_sizes(zeros):
    """A part's packed zeros end inside a word; the next part's begin in a new one."""
    sizes = [13, 8, 3]
    parts = [packed(n, 64, 4, 32, zeros=zeros, seed=n) for n in sizes]
    settings = config("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=not zeros)
    linear = load(settings, 64, sizes, *(stored for stored, _ in parts))
    assert torch.equal(dequant(linear), torch.cat([expected for _, expected in parts]))


def test_one_scale_for_a_packed_matrix():
    parts = [packed(n, 16, 4, None, seed=n) for n in (3, 5)]
    for stored, expected in parts:
        expected /= stored["weight_scale"].float()
        stored["weight_scale"] = stored["weight_scale"][0]
        expected *= stored["weight_scale"].float()
    linear = load(config("pack-quantized", num_bits=4, strategy="tensor"), 16, [3, 5], *(p for p, _ in parts))
    torch.testing.assert_close(dequant(linear), torch.cat([expected for _, expected in parts]))


@pytest.mark.parametrize("order", [True, "group", "dynamic"])
def test_act_order(order):
    settings = config("pack-quantized", num_bits=4, strategy="group", group_size=16, actorder=order)
    stored, expected = packed(9, 64, 4, 16, order=True)
    linear = load(settings, 64, [9], stored)
    assert torch.equal(dequant(linear), expected)
    assert linear.method.scheme.act_order and not linear.method.fusable
    unordered, expected = packed(9, 64, 4, 16)
    linear = load(settings, 64, [9], unordered | {"weight_g_idx": torch.full((64,), -1, dtype=I32)})
    assert torch.equal(dequant(linear), expected)


@pytest.mark.parametrize("order", [None, False, "weight", "static"])
def test_act_order_that_the_writer_undid(order):
    settings = config("pack-quantized", num_bits=4, strategy="group", group_size=16, actorder=order)
    stored, expected = packed(9, 64, 4, 16)
    assert torch.equal(dequant(load(settings, 64, [9], stored)), expected)


def digits(words: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Codes of rows of words, by division."""
    return [[(row[i * bits // 32] & 0xFFFFFFFF) // (1 << i * bits % 32) % (1 << bits) for i in range(count)]
            for row in words.tolist()]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
def test_the_packed_matrix_that_kernels_read(bits, zeros, order):
    """Fused parts of unequal sizes where they can be fused: each part's zeros begin in a word of their own."""
    sizes = [13] if order else [13, 8, 3]
    parts = [packed(n, 60, bits, 32, zeros=zeros, order=order, seed=n)[0] for n in sizes]
    settings = config("pack-quantized", num_bits=bits, strategy="group", group_size=32, symmetric=not zeros,
                      actorder="group" if order else None)
    linear = load(settings, 60, sizes, *parts)
    matrix = linear.method.matrix(linear.weights)
    codes = [row for part in parts for row in digits(part["weight_packed"], bits, 60)]
    assert matrix.codes(0, sum(sizes)).tolist() == codes and matrix.codes(4, 9).tolist() == codes[4:9]
    assert torch.equal(matrix.scales, torch.cat([part["weight_scale"] for part in parts]).float())
    assert (matrix.groups is not None) == order and (matrix.zeros is not None) == zeros
    if order:
        assert torch.equal(matrix.groups, parts[0]["weight_g_idx"])
    if zeros:
        stored = [digits(part["weight_zero_point"].T, bits, n) for part, n in zip(parts, sizes)]
        assert matrix.zeros.T.tolist() == [[zero for row in rows for zero in row] for rows in zip(*stored)]


def eight_bit(form: str, rows: int, columns: int, *shape: int) -> Tensors:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (rows, columns), generator=generator)
    scale = torch.rand(shape, generator=generator) + 0.5
    return {"weight": weight.to(torch.float8_e4m3fn if form[0] == "f" else torch.int8), "weight_scale": scale.to(BF16)}


def spread(stored: Tensors, rows_per: int, columns_per: int) -> torch.Tensor:
    scale = stored["weight_scale"].float().reshape(-1, stored["weight_scale"].shape[-1])
    scale = scale.repeat_interleave(rows_per, 0).repeat_interleave(columns_per, 1)
    return stored["weight"].float() * scale[: stored["weight"].shape[0], : stored["weight"].shape[1]]


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized"])
@pytest.mark.parametrize("weights, shape, spans", [
    ({"strategy": "tensor"}, lambda n: (1,), (999, 999)),
    ({}, lambda n: (1,), (999, 999)),
    ({"strategy": "channel"}, lambda n: (n, 1), (1, 999)),
    ({"group_size": -1}, lambda n: (n, 1), (1, 999)),
    ({"strategy": "group", "group_size": 128}, lambda n: (n, 2), (1, 128)),
    ({"strategy": "block", "block_structure": [128, 128]}, lambda n: (-(-n // 128), 2), (128, 128)),
    ({"strategy": "block", "block_structure": "128x128"}, lambda n: (-(-n // 128), 2), (128, 128)),
])
def test_eight_bit_strategies(form, weights, shape, spans):
    sizes = [150, 33]
    parts = [eight_bit(form, n, 200, *shape(n)) for n in sizes]
    linear = load(config(form, **weights), 200, sizes, *parts)
    assert torch.equal(dequant(linear), torch.cat([spread(part, *spans) for part in parts]))
    assert linear.weights["weight"].itemsize == 1


def test_naive_is_the_same_layout():
    stored = eight_bit("int", 8, 16, 8, 1)
    naive = load(config("naive-quantized", strategy="channel"), 16, [8], stored)
    assert torch.equal(dequant(naive), spread(stored, 1, 999))


X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 3, 5)[:, None]
TOKEN, GROUP = {"dynamic": True, "strategy": "token"}, {"dynamic": True, "strategy": "group", "group_size": 128}


def int8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


def fp8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def amax(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("form, inputs, expected", [
    ("int-quantized", None, X),
    ("int-quantized", TOKEN, int8(X, amax(X) / 127.5)),
    ("int-quantized", {"dynamic": True}, int8(X, amax(X) / 127.5)),
    ("int-quantized", {"strategy": "tensor"}, int8(X, 0.25)),
    ("float-quantized", TOKEN, fp8(X, amax(X) / 448)),
    ("float-quantized", {"dynamic": True, "strategy": "tensor"}, fp8(X, amax(X) / 448)),
    ("float-quantized", {"dynamic": False}, fp8(X, 0.25)),
    ("float-quantized", GROUP, torch.cat([fp8(x, amax(x) / 448) for x in X.split(128, -1)], -1)),
])
def test_product_is_of_the_rounded_input(form, inputs, expected):
    stored = eight_bit(form, 16, 200, 16, 1)
    if inputs and not inputs.get("dynamic"):
        stored["input_scale"] = torch.tensor([0.25], dtype=BF16)
    linear = load(config(form, inputs, strategy="channel"), 200, [16], stored)
    assert torch.equal(linear.method.quantize_input(linear.weights, X), expected)
    exact = expected.double() @ dequant(linear).double().T
    torch.testing.assert_close(linear(X), exact.float(), rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_the_most_exact_target_decides():
    settings = config("pack-quantized", num_bits=4, strategy="channel")
    for name, targets, bits in (("by_regex", [r"re:.*\.down_proj"], 8), ("by_name", ["m.0.down_proj"], 4)):
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
        settings["config_groups"][name] = {"targets": targets, "weights": weights}

    def scheme(name: str) -> str:
        return str(method_for(settings, 32, 8, None, name).scheme)

    assert scheme("m.0.up_proj") == "int4"
    assert scheme("m.1.down_proj") == "int8 g16"
    assert scheme("m.0.down_proj") == "int4 g16"


def test_mixed_precision_names_a_format_in_each_group():
    settings = config("int-quantized", TOKEN, strategy="channel") | {"format": "mixed-precision"}
    assert str(method_for(settings, 8, 8, None).scheme) == "int8, input int8 per token dynamic"
    del settings["config_groups"]["group_0"]["format"]
    with pytest.raises(CheckpointError, match="format 'mixed-precision'"):
        method_for(settings, 8, 8, None)


@pytest.mark.parametrize("ignore", ["m.a", "m", r"re:.*\.a$", "Linear"])
def test_ignored_layers(ignore):
    """What is stored decides; the list is asked where nothing is."""
    settings = config("int-quantized", strategy="channel") | {"ignore": [ignore]}
    assert method_for(settings, 16, 8, None) is None
    assert method_for(settings, 16, 8, {"weight": torch.zeros(8, 16, dtype=BF16)}) is None
    assert isinstance(method_for(settings, 16, 8, eight_bit("int", 8, 16, 8, 1)), LinearMethod)


def test_floats_that_no_list_names_and_absent_tensors_are_not_quantized():
    settings = config("int-quantized", strategy="channel")
    assert method_for(settings, 16, 8, {"weight": torch.zeros(8, 16)}) is None
    assert method_for(settings, 16, 8, {}) is None


def test_made_up_weights():
    """Without a shape and an order of columns, which random values cannot be."""
    settings = config("pack-quantized", num_bits=4, strategy="group", group_size=16, actorder="group", symmetric=False)
    specs = method_for(settings, 40, 20, None).specs(layer(40, 20), F32)
    assert {name: spec.shape for name, spec in specs.items()} == {
        "weight_packed": (20, 5), "weight_scale": (20, 3), "weight_zero_point": (3, 3)}


W4 = config("pack-quantized", num_bits=4, strategy="group", group_size=32)
W8A8 = config("int-quantized", TOKEN, strategy="channel")
PACKED, INT8 = packed(8, 64, 4, 32)[0], eight_bit("int", 8, 64, 8, 1)


@pytest.mark.parametrize("settings, stored, words", [
    (W4, PACKED | {"weight_scale": torch.ones(8, 4)}, r"weight_scale \[8, 2\]; stored: .*\[8, 4\]"),
    (W4, PACKED | {"weight_packed": torch.zeros(8, 16, dtype=I32)}, r"weight_packed \[8, 8\]; stored: .*\[8, 16\]"),
    (W4, {k: v for k, v in PACKED.items() if k != "weight_scale"}, "weight_scale"),
    (W4, packed(8, 64, 4, 32, zeros=True)[0], "symmetric .* so weight_zero_point none"),
    (W4, packed(8, 64, 4, 32, order=True)[0], "without g_idx, so weight_g_idx none"),
    (config("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"), PACKED, "with g_idx"),
    (W4, INT8, "pack-quantized; stored: weight int8"),
    (W8A8, PACKED, "int8 weights; stored: weight_packed"),
    (W8A8, eight_bit("float", 8, 64, 8, 1), "int8 weights; stored: weight float8_e4m3fn"),
    (W8A8, INT8 | {"weight_scale": torch.ones(1)}, r"a float scale \[8\] or \[8, 1\]"),
    (W8A8, INT8 | {"input_scale": torch.ones(1)}, "no static input"),
    (config("int-quantized", {"strategy": "tensor"}, strategy="channel"), INT8, "exactly one of input_scale"),
])
def test_contradictions_name_both_readings(settings, stored, words):
    with pytest.raises(CheckpointError, match=f"(?s)m.a: .*config: .*{words}"):
        method_for(settings, 64, 8, stored)


def test_stored_quantized_but_no_target_names_it():
    settings = config("int-quantized", strategy="channel")
    settings["config_groups"]["group_0"]["targets"] = ["other"]
    with pytest.raises(CheckpointError, match="no target of config_groups names it; stored: weight int8"):
        method_for(settings, 64, 8, INT8)
    assert method_for(settings, 64, 8, None) is None


@pytest.mark.parametrize("change, words", [
    ({"weight_shape": torch.tensor([8, 65])}, r"a: weight_shape .*\n.*config: \[8, 64\]; stored: \[8, 65\]"),
    ({"weight_scale": torch.zeros(8, 2)}, "a: weight_scale holds"),
    ({"weight_scale": torch.full((8, 2), float("nan"))}, "a: weight_scale holds"),
    ({"weight_g_idx": torch.full((64,), 2, dtype=I32)}, "2 to 2\n.*0 to 1"),
    ({"weight_g_idx": torch.arange(64, dtype=I32) - 1}, "-1 to 62"),
])
def test_values_that_cannot_be_meant(change, words):
    order = "group" if "weight_g_idx" in change else None
    settings = config("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder=order)
    with pytest.raises(CheckpointError, match=words):
        load(settings, 64, [8], PACKED | change)


@pytest.mark.parametrize("form", ["marlin-24", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "sparse-bitmask",
                                  "sparse-24-bitmask", "dense", None])
def test_formats_refused_by_name(form):
    settings = config("int-quantized", strategy="channel") | {"format": form}
    settings["config_groups"]["group_0"]["format"] = form
    with pytest.raises(CheckpointError, match=f"format {form!r} is not implemented\n  known: float-quantized"):
        CompressedTensorsConfig.from_checkpoint(settings)


@pytest.mark.parametrize("settings, words", [
    ({}, "no config_groups"), ({"config_groups": {"a": {}}}, "config_groups.a does not say"),
    (W8A8 | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    (W8A8 | {"transform_config": {"rotate": {}}}, "transform_config"),
    (W8A8 | {"ignored": ["a"]}, "did you mean ignore"), (W8A8 | {"ignore": [1]}, "ignore must be a list of names"),
    (config("pack-quantized", num_bits=3), "num_bits 3"), (config("int-quantized", num_bits=4), "num_bits 4"),
    (config("pack-quantized", type="float"), "type 'float'"), (config("float-quantized", type="int"), "type 'int'"),
    (config("int-quantized", symmetric=False), "symmetric False"), (config("int-quantized", dynamic=True), "dynamic"),
    (config("pack-quantized", strategy="tensor", symmetric=False), "asymmetric with strategy 'tensor'"),
    (config("pack-quantized", strategy="block"), "strategy 'block'"),
    (config("int-quantized", strategy="tensor_group"), "strategy 'tensor_group'"),
    (config("int-quantized", strategy="block"), "no size for strategy 'block'"),
    (config("pack-quantized", strategy="group"), "no size for strategy 'group'"),
    (config("pack-quantized", actorder="random"), "actorder 'random'"),
    (config("pack-quantized", TOKEN), "pack-quantized with input_activations"),
    (config("int-quantized", TOKEN | {"symmetric": False}), "symmetric False"),
    (config("int-quantized", TOKEN | {"num_bits": 4}), "num_bits 4"),
    (config("int-quantized", TOKEN | {"type": "float"}), "type 'float'"),
    (config("int-quantized", TOKEN | {"dynamic": "local"}), "dynamic 'local'"),
    (config("int-quantized", {"strategy": "token"}), "strategy 'token'"),
    (config("int-quantized", {"strategy": "group", "dynamic": True}), "strategy 'group'"),
    (config("int-quantized", rounding="up"), "rounding"),
])
def test_refused_settings(settings, words):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        CompressedTensorsConfig.from_checkpoint(settings)


def test_refuses_quantized_outputs():
    settings = config("int-quantized", strategy="channel")
    settings["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="output_activations"):
        CompressedTensorsConfig.from_checkpoint(settings)


def test_the_cache_scheme_is_accepted():
    parsed = CompressedTensorsConfig.from_checkpoint(W8A8 | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert parsed == CompressedTensorsConfig.from_checkpoint(W8A8)
