"""examples/plugins/nybble-nf4: its codes against a search over the levels, its layers, what it writes and refuses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from nybble.plugins.errors import CheckpointError, UsageError
from nybble.quant import LayerShape, Part, Stored

PACKAGE = Path(__file__).parents[2] / "examples" / "plugins" / "nybble-nf4"
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def nf4():
    """method.py and convert.py, imported as if the package were installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        yield import_module("nybble_nf4.method"), import_module("nybble_nf4.convert")
    for name in [name for name in sys.modules if name.partition(".")[0] == "nybble_nf4"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def method(nf4):
    return nf4[0]


def shape(rows: int, columns: int) -> LayerShape:
    return LayerShape(in_features=columns, parts=(Part(name="up_proj", size=rows),))


def load(method, weights):
    """(the method, its weights after loading)"""
    rows, bytes_ = weights["weight"].shape
    made = method.NF4Method()
    specs = made.specs(shape(rows, 2 * bytes_), torch.float32)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == \
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    return made, made.after_load(weights, shape(rows, 2 * bytes_))


def test_the_levels_are_the_papers(method):
    """Quantiles of N(0, 1): 8 above 0, 7 below it and 0 itself, the last at 1 - (1/32 + 1/30) / 2."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    up, down = ([NormalDist().inv_cdf(p) for p in np.linspace(0.5, last, n)] for n in (9, 8))
    quantiles = np.sort([*up, *(-quantile for quantile in down[1:])])
    np.testing.assert_allclose(method.LEVELS, quantiles / up[-1], atol=1e-6)


def test_bytes_mean_what_the_page_says(method):
    """The first code of a byte lies in its high half; each 64 inputs have their own factor."""
    weight = torch.tensor([[0x7F] * 32 + [0x0E] * 32], dtype=torch.uint8)
    made, loaded = load(method, {"weight": weight, "absmax": torch.tensor([[2.0, 10.0]])})
    expected = torch.tensor([0.0, 2.0] * 32 + [-10.0, 7.229568362236023] * 32)
    torch.testing.assert_close(made.dequant(loaded)[0], expected, rtol=0, atol=0)


MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 2)).flatmap(
    lambda size: arrays(np.float32, (size[0], size[1] * 64), elements=st.floats(-1, 1, width=32) | st.just(0.0)))


@given(matrix=MATRICES, exponent=st.integers(-60, 60))
def test_every_value_becomes_the_nearest_level(method, matrix, exponent):
    matrix = np.ldexp(np.where(np.abs(matrix) < 1e-6, 0, matrix), exponent)
    made, loaded = load(method, method.quantize(torch.from_numpy(matrix)))
    got = made.dequant(loaded).double().numpy().reshape(-1, 64)
    blocks = matrix.astype(np.float64).reshape(-1, 64)
    levels = np.array(method.LEVELS) * np.abs(blocks).max(1)[:, None]
    nearest = np.abs(blocks[..., None] - levels[:, None]).min(2)
    assert (np.abs(got - blocks) <= nearest * (1 + 1e-5) + np.ldexp(1e-7, exponent)).all()
    again = method.quantize(made.dequant(loaded))
    assert all(torch.equal(again[name], loaded[name]) for name in again)


def test_products_go_tile_by_tile(method):
    """Over more rows than a tile has, `apply` is the product with the whole matrix."""
    torch.manual_seed(0)
    made, loaded = load(method, method.quantize(torch.randn(300, 128)))
    x, bias = torch.randn(2, 3, 128), torch.randn(300)
    expected = (x.double() @ made.dequant(loaded).double().T + bias).float()
    torch.testing.assert_close(made.apply(loaded, x, bias), expected)


U8, F32 = torch.uint8, torch.float32


@pytest.mark.parametrize("name, columns, found, quantized", [
    (NAME, 128, {"weight": Stored(U8, (8, 64)), "absmax": Stored(F32, (8, 2))}, True),
    (NAME, 128, {"weight": Stored(F32, (8, 128))}, False),
    (NAME, 128, {}, False),
    (NAME, 128, None, True),
    (NAME, 96, None, False),
    ("lm_head", 128, None, False),
], ids=["stored", "float", "missing", "made-up", "made-up-96", "made-up-head"])
def test_what_is_stored_decides(method, name, columns, found, quantized):
    made = method.NF4Config.from_checkpoint({"quant_method": "nf4"}).method_for(name, shape(8, columns), found)
    assert made == (method.NF4Method() if quantized else None)


def test_refusals(method):
    for config in ({"block_size": 32}, {"block_size": 64, "bnb_4bit_use_double_quant": True}):
        with pytest.raises(CheckpointError, match="no such settings"):
            method.NF4Config.from_checkpoint(config)
    with pytest.raises(CheckpointError, match=r"up_proj: NF4 needs whole blocks"):
        method.NF4Config().method_for(NAME, shape(8, 96), {"weight": Stored(U8, (8, 48))})
    with pytest.raises(CheckpointError, match="up_proj: 1 of 4 blocks"):
        method.NF4Method().after_load({"absmax": torch.tensor([[1.0, float("nan")], [1, 1]])}, shape(2, 128))
    with pytest.raises(CheckpointError, match="x: 1 of 1 blocks"):
        method.quantize(torch.full((1, 64), float("inf")), "x")


def test_a_folder_is_converted(nf4, tmp_path, capsys):
    """Layers' matrices become NF4; head, norm and a matrix of 96 inputs stay; config.json says what happened."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    layer = "model.layers.0.mlp."
    kept = {"lm_head.weight": torch.randn(4, 64), "model.norm.weight": torch.randn(64),
            f"{layer}down_proj.weight": torch.randn(4, 96).half()}
    up = torch.randn(4, 128).bfloat16()
    save_file(kept | {f"{layer}up_proj.weight": up}, source / "model.safetensors")
    (source / "config.json").write_text('{"hidden_size": 64}')
    (source / "tokenizer.json").write_text("{}")
    assert nf4[1].main([str(source), str(target)]) == 0
    assert "1 matrices in NF4, 1 left" in capsys.readouterr().out
    quantized = {f"{layer}up_proj.{name}": tensor for name, tensor in nf4[0].quantize(up).items()}
    stored = load_file(target / "model.safetensors")
    assert {n: (t.dtype, t.tolist()) for n, t in stored.items()} == \
        {n: (t.dtype, t.tolist()) for n, t in (kept | quantized).items()}
    assert json.loads((target / "config.json").read_text()) == {
        "hidden_size": 64, "quantization_config": {"quant_method": "nf4", "block_size": 64}}
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]

    with pytest.raises(UsageError, match="not an empty folder"):
        nf4[1].convert(source, target)
    with pytest.raises(CheckpointError, match="quantized already"):
        nf4[1].convert(target, tmp_path / "again")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        nf4[1].convert(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()
