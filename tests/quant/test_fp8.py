"""FP8: every spelling of a scale, blocks that end short, fused parts, input rounding, and every refusal."""

from __future__ import annotations

import re

import pytest
import torch

from nybble.plugins.errors import CheckpointError
from nybble.quant import LayerShape, Linear, Part, Stored
from nybble.quant.fp8 import Fp8Config

E4M3, F32, BF16, F16, U8 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16, torch.uint8
BLOCKS = {"weight_block_size": [128, 128]}
STATIC, DYNAMIC = {"activation_scheme": "static"}, {"activation_scheme": "dynamic"}


def layer(columns: int, *sizes: int) -> LayerShape:
    return LayerShape(in_features=columns, parts=tuple(Part(name="abcd"[i], size=n) for i, n in enumerate(sizes)))


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def method_for(settings: dict, columns: int, rows: int, stored: dict[str, torch.Tensor] | None, name: str = "m.a"):
    config = Fp8Config.from_checkpoint({"quant_method": "fp8", **settings})
    return config.method_for(name, layer(columns, rows), None if stored is None else describe(stored))


def load(settings: dict, columns: int, *parts: dict[str, torch.Tensor]) -> Linear:
    """A loaded layer whose parts are stored as given."""
    sizes = [len(part["weight"]) for part in parts]
    (method,) = {method_for(settings, columns, n, part) for n, part in zip(sizes, parts)}
    linear = Linear("m", layer(columns, *sizes), method, dtype=F32, device=torch.device("cpu"))
    for slot in linear.slots():
        _, part, name = slot.name.split(".")
        value = parts["abcd".index(part)][name]
        assert value.shape == slot.target.shape and value.dtype in slot.sources
        slot.target.copy_(value)
    linear.after_load()
    return linear


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 50).to(E4M3)


def scales(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What each weight is multiplied by, element for element."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(rows, columns)
    if scale.shape in ((rows,), (rows, 1)):
        return scale.float().reshape(rows, 1).expand(rows, columns)
    return torch.stack([torch.stack([scale[r // 128, c // 128] for c in range(columns)]) for r in range(rows)]).float()


def reference(part: dict[str, torch.Tensor], name: str = "weight_scale") -> torch.Tensor:
    return part["weight"].float() * spread(part[name], *part["weight"].shape)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (40,), (40, 1)], ids=str)
def test_every_spelling_of_a_scale(name, dtype, shape):
    part = {"weight": matrix(40, 24), name: scales(*shape, dtype=dtype)}
    linear = load({}, 24, part)
    assert torch.equal(linear.method.dequant(linear.weights), reference(part, name))
    assert linear.weights["weight"].dtype == E4M3 and linear.method.fusable


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("rows, columns", [(128, 128), (160, 128), (64, 300), (576, 130), (1, 1)])
def test_blocks_end_short(rows, columns, name):
    part = {"weight": matrix(rows, columns), name: scales(-(-rows // 128), -(-columns // 128), dtype=BF16)}
    linear = load(BLOCKS | DYNAMIC, columns, part)
    expected = reference(part, name)
    assert torch.equal(linear.method.dequant(linear.weights), expected)
    for start, stop in [(0, 1), (rows // 2, rows), (rows - 1, rows), (rows, rows)]:
        assert torch.equal(linear.method.dequant_rows(linear.weights, start, stop), expected[start:stop])


def test_exponents_without_a_dtype():
    """DeepSeek's ue8m0: bytes e that mean 2^(e - 127)."""
    part = {"weight": matrix(130, 20), "weight_scale_inv": torch.tensor([[120], [130]], dtype=U8)}
    linear = load(BLOCKS | {"scale_fmt": "ue8m0"}, 20, part)
    part["weight_scale_inv"] = torch.tensor([[2.0**-7], [2.0**3]])
    assert torch.equal(linear.method.dequant(linear.weights), reference(part, "weight_scale_inv"))


@pytest.mark.parametrize("settings, shape", [
    ({}, lambda n: ()), ({}, lambda n: (1,)), ({}, lambda n: (n, 1)), (BLOCKS, lambda n: (-(-n // 128), 2)),
], ids=["scalar", "one", "channel", "block"])
def test_fused_parts_keep_their_scales(settings, shape):
    """Also where a part ends inside a block, after which the next part's blocks start anew."""
    parts = [{"weight": matrix(n, 200, i), "weight_scale": scales(*shape(n), seed=i)} for i, n in
             enumerate([160, 33, 128])]
    linear = load(settings, 200, *parts)
    expected = torch.cat([reference(part) for part in parts])
    assert torch.equal(linear.method.dequant(linear.weights), expected)
    assert torch.equal(linear.method.dequant_rows(linear.weights, 150, 200), expected[150:200])


@pytest.mark.parametrize("settings, shape, scale_rows", [
    (DYNAMIC, lambda n: (), None), (DYNAMIC, lambda n: (n, 1), None),
    (BLOCKS | DYNAMIC, lambda n: (-(-n // 128), 2), [0] * 128 + [1] * 32 + [2] * 33 + [3] * 128),
], ids=["tensor", "channel", "block"])
def test_the_matrix_that_kernels_read(settings, shape, scale_rows):
    sizes = [160, 33, 128]
    parts = [{"weight": matrix(n, 200, i), "weight_scale": scales(*shape(n), seed=i)} for i, n in enumerate(sizes)]
    linear = load(settings, 200, *parts)
    found = linear.method.matrix(linear.weights)
    stored = torch.cat([part["weight"].view(U8) for part in parts])
    for start, stop in [(0, 321), (7, 170)]:
        assert torch.equal(found.codes(start, stop).view(U8), stored[start:stop])
    assert found.scale_rows is None if scale_rows is None else found.scale_rows.tolist() == scale_rows
    at = torch.arange(321) if scale_rows is None else found.scale_rows.long()
    for n, (part, row) in enumerate((part, row) for part, size in zip(parts, sizes) for row in range(size)):
        scale = part["weight_scale"]
        expected = scale.reshape(1) if scale.ndim == 0 else scale[row // 128 if scale_rows else row]
        assert torch.equal(found.scales[at[n]], expected)
    assert (found.zeros, found.zero, found.groups, found.input_scale) == (None, 0, None, None)


def rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(E4M3).float() * scale


def token_scale(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True) / 448


X = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 3, 5)[:, None]
INPUTS = {
    "float": ({}, (), {}, X),
    "null": ({"activation_scheme": None}, (), {}, X),
    "token": (DYNAMIC, (), {}, rounded(X, token_scale(X))),
    "static": (STATIC, (), {"input_scale": torch.tensor(0.5)}, rounded(X, 0.5)),
    "static [1]": (STATIC, (1,), {"activation_scale": torch.tensor([0.5], dtype=BF16)}, rounded(X, 0.5)),
    "groups": (BLOCKS | DYNAMIC, (3, 3), {}, torch.cat([rounded(x, token_scale(x)) for x in X.split(128, -1)], -1)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_product_is_of_the_rounded_input(case):
    settings, shape, stored, x = INPUTS[case]
    linear = load(settings, 300, {"weight": matrix(260, 300), "weight_scale": scales(*shape), **stored})
    torch.testing.assert_close(linear.method.quantize_input(linear.weights, X), x, rtol=0, atol=0)
    exact = x.double() @ linear.method.dequant(linear.weights).double().T
    torch.testing.assert_close(linear(X), exact.float(), rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_static_inputs_are_not_fused():
    stored = {"weight": matrix(8, 8), "weight_scale": scales(), "input_scale": scales()}
    assert not method_for(STATIC, 8, 8, stored).fusable


@pytest.mark.parametrize("settings, shape", [(DYNAMIC, ()), (BLOCKS | DYNAMIC, (1, 1))])
def test_a_token_of_zeros_stays_zero_and_nan_stays_nan(settings, shape):
    linear = load(settings, 16, {"weight": matrix(4, 16), "weight_scale": scales(*shape)})
    x = torch.zeros(2, 16)
    x[1, 3] = float("nan")
    out = linear(x)
    assert torch.equal(out[0], torch.zeros(4)) and out[1].isnan().all()


@pytest.mark.parametrize("stored", [
    {}, {"weight": torch.zeros(8, 8, dtype=BF16)}, {"weight": torch.zeros(8, 8)},
    {"weight": torch.zeros(8, 8, dtype=F16), "weight_scale_inv": scales(1, 1)},
])
def test_what_is_stored_in_floating_point_is_not_quantized(stored):
    assert method_for(BLOCKS, 8, 8, stored) is None


def test_what_is_stored_goes_before_what_is_ignored():
    stored = {"weight": matrix(8, 8), "weight_scale": scales()}
    assert method_for({"ignored_layers": ["m.a"]}, 8, 8, stored) is not None


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_made_up_weights_follow_the_config(key):
    settings = {key: ["lm_head", "m.a"]}
    assert method_for(settings, 8, 8, None, "m.a") is None
    assert set(method_for(settings, 8, 8, None, "m.ab").specs(layer(8, 8), F32)) == {"weight", "weight_scale"}
    static = method_for(STATIC, 8, 8, None).specs(layer(8, 8), F32)
    assert static["input_scale"].shape == (1,)
    block = method_for(BLOCKS, 200, 130, None).specs(layer(200, 130), F32)
    assert block["weight_scale_inv"].shape == (2, 2)


@pytest.mark.parametrize("settings, scheme", [
    (DYNAMIC, "fp8, input fp8_e4m3 per token dynamic"), (STATIC, "fp8, input fp8_e4m3 per tensor static"), ({}, "fp8"),
    (BLOCKS | DYNAMIC, "fp8 blocks 128x128, input fp8_e4m3 per group128 dynamic"),
])
def test_scheme(settings, scheme):
    assert str(method_for(settings, 8, 8, None).scheme) == scheme


W, S = matrix(8, 8), scales()


@pytest.mark.parametrize("settings, stored, words", [
    ({}, {"weight": W}, "exactly one of weight_scale, weight_scale_inv, scale"),
    ({}, {"weight": W, "weight_scale": S, "scale": S}, "exactly one of"),
    ({}, {"weight": W, "weight_scale": scales(2, 2)}, r"\[2, 2\]"),
    ({}, {"weight": W, "weight_scale": S.int()}, "weight_scale int32"),
    (BLOCKS, {"weight": W, "weight_scale_inv": S}, r"blocks of \[128, 128\]: a float scale \[1, 1\]; stored: .*\[\]"),
    (BLOCKS, {"weight": W, "weight_scale_inv": scales(2, 1)}, r"float scale \[1, 1\]; stored: .*\[2, 1\]"),
    ({}, {"weight": matrix(8, 9), "weight_scale": S}, r"a matrix \[8, 8\]; stored: weight float8_e4m3fn \[8, 9\]"),
    (STATIC, {"weight": W, "weight_scale": S}, "exactly one of input_scale, activation_scale"),
    (STATIC, {"weight": W, "weight_scale": S, "input_scale": scales(8)}, r"input_scale float32 \[8\]"),
    (DYNAMIC, {"weight": W, "weight_scale": S, "input_scale": S}, "no static input"),
    ({}, {"weight": W.float().to(torch.float8_e5m2)}, "float8_e5m2"),
    ({}, {"weight": W.float().to(torch.float8_e4m3fnuz)}, "float8_e4m3fnuz"),
    ({}, {"weight": W.view(torch.int8), "weight_scale": S}, "weight int8"),
])
def test_contradictions_name_both_readings(settings, stored, words):
    with pytest.raises(CheckpointError, match=f"(?s)m.a: .*config: .*{words}"):
        method_for(settings, 8, 8, stored)


@pytest.mark.parametrize("settings, words", [
    ({"fmt": "e5m2"}, "fmt 'e5m2'"), ({"scale_fmt": "int"}, "scale_fmt"), ({"expert_dtype": "fp4"}, "expert_dtype"),
    ({"activation_scheme": "sometimes"}, "activation_scheme 'sometimes'"), (BLOCKS | STATIC, "weight_block_size"),
    ({"weight_block_size": 128}, "two positive integers"), ({"weight_block_size": [128, 0]}, "two positive integers"),
    ({"activation_schema": "static"}, "did you mean activation_scheme"),
    ({"modules_to_convert": ["a"]}, "modules_to_convert"), ({"ignored_layers": "lm_head"}, "a list of names"),
])
def test_refused_settings(settings, words):
    with pytest.raises(CheckpointError, match=words):
        Fp8Config.from_checkpoint(settings)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_scales_that_cannot_be_meant(name, value):
    part = {"weight": W, "weight_scale": scales(), "input_scale": scales(), name: torch.tensor(value)}
    with pytest.raises(CheckpointError, match=f"a: {name} holds"):
        load(STATIC, 8, part)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("settings", [{}, BLOCKS], ids=["tensor", "blocks"])
def test_weights_that_are_nan_are_refused(settings, code):
    """The kernel of tiles would multiply by 480 instead."""
    weight = matrix(4, 8)
    weight.view(U8)[2, 5] = code
    scale = {"weight_scale_inv": scales(1, 1)} if settings else {"weight_scale": scales()}
    with pytest.raises(CheckpointError, match="a: weight holds NaN"):
        load(settings, 8, {"weight": weight, **scale})


@pytest.mark.parametrize("name, ignored", [
    ("mlp.up_proj.weight_scale_inv", True), ("mlp.up_proj.weight_scale", False), ("mlp.up_proj.output_scale", False),
    ("self_attn.k_proj.input_scale", False), ("self_attn.k_proj.bias", False), ("self_attn.k_scale", False),
])
def test_tensors_without_a_use(name, ignored):
    patterns = Fp8Config().ignored_tensors
    assert any(re.fullmatch(p, f"model.layers.0.{name}") for p in patterns) == ignored
