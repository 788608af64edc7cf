"""Quantized checkpoints broken in every way we know (truncated, mislabelled, mismatched, with scales that are none):
one error that says where, what was expected and what was found, from `nybble generate` and `nybble inspect` alike."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nybble.engine.cli import main
from nybble.plugins.errors import NybbleError

FORMS = ("gptq", "awq", "fp8", "ct")
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ATTN, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
Q, UP, DOWN = f"{ATTN}.q_proj", f"{MLP}.up_proj", f"{MLP}.down_proj"  # [64, 64], [96, 64], [64, 96]
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}}
PLAIN = ["--device", "cpu", "--dtype", "float32", "--num-gpu-blocks-override", "9"]


class Fault(NamedTuple):
    """What the error of loading a broken checkpoint of `form` must say, and how to break it.

    Attributes:
        change: made to the checkpoint before it is written. harm: done to its folder after.
        unseen: headers do not show it, so that only loading can tell.
    """

    form: str
    words: list[str]
    change: Callable = lambda checkpoint: None
    harm: Callable = lambda folder: None
    unseen: bool = False


def put(**tensors):
    """Replace tensors by what a function makes of them: put(q_proj__scales=lambda t: t[:1])."""
    places = {"q_proj": Q, "up_proj": UP, "down_proj": DOWN}

    def change(checkpoint):
        for spelled, make in tensors.items():
            part, _, last = spelled.partition("__")
            name = f"{places[part]}.{last}"
            made = make(checkpoint.tensors.pop(name, None))
            checkpoint.tensors.update({} if made is None else {name: made})

    return change


def says(**settings):
    """Change quantization_config."""
    return lambda checkpoint: checkpoint.settings.update(settings)


def weights_say(**settings):
    """Change what compressed-tensors' config says of weights."""
    return lambda checkpoint: checkpoint.settings["config_groups"]["group_0"]["weights"].update(settings)


def model_says(**settings):
    """Change config.json."""
    return lambda checkpoint: checkpoint.config.update(settings)


def both(*changes):
    return lambda checkpoint: [change(checkpoint) for change in changes]


def uneven(size):
    """An MLP of another size, stored in floating point except for the matrix that reads it."""

    def change(checkpoint):
        checkpoint.config["intermediate_size"] = size
        for name in [name for name in checkpoint.tensors if "gate_proj" in name or "up_proj" in name]:
            del checkpoint.tensors[name]
            checkpoint.tensors[f"{name.rpartition('.')[0]}.weight"] = torch.ones(size, 64)

    return change


def gone(_):
    return None


def filled(value):
    """A tensor with one value replaced."""

    def fill(tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[-1:] = value
        return tensor

    return fill


def file(change):
    """Change the bytes of the written file."""
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def header(change):
    """Change the text of the written file's header."""

    def edit(content):
        size = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + size])
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return file(edit)


def entry(name, **changes):
    """Change one entry of the header; a function is given the value that stands there."""

    def edit(text):
        parsed = json.loads(text)
        for key, value in changes.items():
            parsed[name][key] = value(parsed[name][key]) if callable(value) else value
        return json.dumps(parsed).encode()

    return header(edit)


def sharded(change=lambda index: None, *, lose=()):
    """The written file as two shards and an index, of which `change` makes another; `lose` takes files away."""

    def split(folder):
        tensors = load_file(folder / FILE)
        (folder / FILE).unlink()
        index = {name: ONE if "layers.0" in name else TWO for name in tensors}
        for shard in (ONE, TWO):
            save_file({name: tensors[name] for name, where in index.items() if where == shard}, folder / shard)
        change(index)
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
        for name in lose:
            (folder / name).unlink()

    return split


def fewer_rows(checkpoint):
    """Fewer rows in embedding and head than the tokenizer has tokens."""
    checkpoint.config["vocab_size"] = 250
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        checkpoint.tensors[name] = checkpoint.tensors[name][:250]


FAULTS = {
    # F19: the file
    "truncated": Fault("gptq", [FILE, "expected a file of", "truncated"], harm=file(lambda b: b[:-64])),
    "padded": Fault("awq", [FILE, "expected its end at byte", "6 bytes more"], harm=file(lambda b: b + bytes(6))),
    "overlapping": Fault("fp8", [FILE, f"{Q}.weight", "expected its data at byte", "overlaps"],
                         harm=entry(f"{Q}.weight", data_offsets=lambda o: [o[0] - 4, o[1] - 4])),
    "other product": Fault("ct", [FILE, f"{Q}.weight_packed", "expected 1792 bytes of data for I32 [64, 7]"],
                           harm=entry(f"{Q}.weight_packed", shape=[64, 7])),
    "unknown dtype": Fault("gptq", [FILE, f"{Q}.qweight", "expected a dtype of", "found 'I4'"],
                           harm=entry(f"{Q}.qweight", dtype="I4")),
    "gptq transposed": Fault("gptq", [Q, "so qweight [8, 64]", "qweight int32 [64, 8]"],
                             change=put(q_proj__qweight=lambda t: t.T)),
    "awq transposed": Fault("awq", [UP, "so qweight [64, 12]", "qweight int32 [12, 64]"],
                            change=put(up_proj__qweight=lambda t: t.T)),
    "fp8 transposed": Fault("fp8", [DOWN, "a matrix [64, 96]", "weight float8_e4m3fn [96, 64]"],
                            change=put(down_proj__weight=lambda t: t.T)),
    "ct transposed": Fault("ct", [Q, "so weight_packed [64, 8]", "weight_packed int32 [8, 64]"],
                           change=put(q_proj__weight_packed=lambda t: t.T)),
    "gptq in 64 bits": Fault("gptq", [FILE, f"{Q}.qweight", "expected I32 [8, 64], found I64 [8, 64]"],
                             change=put(q_proj__qweight=torch.Tensor.long)),
    "ct in 64 bits": Fault("ct", [FILE, f"{Q}.weight_packed", "expected I32 [64, 8], found I64 [64, 8]"],
                           change=put(q_proj__weight_packed=torch.Tensor.long)),
    "gptq integer scales": Fault("gptq", [Q, "scales int32 [2, 64]"], change=put(q_proj__scales=torch.Tensor.int)),
    "fp8 integer scale": Fault("fp8", [Q, "weight_scale int32 []"], change=put(q_proj__weight_scale=torch.Tensor.int)),
    "fp8 of another kind": Fault("fp8", [Q, "float8_e4m3fn is implemented", "weight float8_e5m2 [64, 64]"],
                                 change=put(q_proj__weight=lambda t: t.float().to(torch.float8_e5m2))),
    # F20, F21: the header and the scales
    "header bomb": Fault("gptq", [FILE, "expected a header of at most", str(1 << 40)],
                         harm=file(lambda b: struct.pack("<Q", 1 << 40) + b[8:])),
    "duplicate key": Fault("awq", [FILE, "duplicate key a"],
                           harm=header(lambda t: t[:-1].rstrip(b" }") + b"}," + b'"a":{},"a":{}}')),
    "gptq of size 0": Fault("gptq", [Q, "so qweight [8, 64]", "int32 [0, 64]"],
                            change=put(q_proj__qweight=lambda t: t[:0])),
    "gptq scales of size 0": Fault("gptq", [Q, "so 2 rows of scales", "scales float16 [0, 64]"],
                                   change=put(q_proj__scales=lambda t: t[:0])),
    "awq of size 0": Fault("awq", [FILE, f"{Q}.qzeros", "expected I32 [2, 8], found I32 [0, 8]"],
                           change=put(q_proj__qzeros=lambda t: t[:0])),
    "fp8 scale of size 0": Fault("fp8", [Q, "a float scale [] or [1]", "weight_scale float32 [0]"],
                                 change=put(q_proj__weight_scale=lambda t: t.view(1)[:0])),
    "ct scale of size 0": Fault("ct", [Q, "so weight_scale [64, 2]", "weight_scale bfloat16 [64, 0]"],
                                change=put(q_proj__weight_scale=lambda t: t[:, :0])),
    **{
        f"{form} scale {value}": Fault(form, [ATTN, "q_proj", f"{name} holds values that are no scale", f"as {value}"],
                                       change=put(**{f"q_proj__{name}": filled(value)}))
        for form, name in (("gptq", "scales"), ("awq", "scales"), ("fp8", "weight_scale"), ("ct", "weight_scale"))
        for value in (0.0, float("nan"), float("inf"))
    },
    # F22: shards
    "missing shard": Fault("gptq", [TWO, "expected a readable file", "No such file"], harm=sharded(lose=[TWO])),
    "shard out of the index": Fault("awq", [TWO, "expected 2 shards", "1, without ['00002']"],
                                    harm=sharded(lambda index: [index.pop(n) for n in list(index) if index[n] == TWO])),
    "index names a missing tensor": Fault("fp8", [ONE, f"{Q}.input_scale", f"expected it here, as {INDEX} says"],
                                          harm=sharded(lambda index: index.update({f"{Q}.input_scale": ONE}))),
    "index without a tensor": Fault("ct", [ONE, f"{Q}.weight_scale", f"expected only tensors that {INDEX} names"],
                                    harm=sharded(lambda index: index.pop(f"{Q}.weight_scale"))),
    "path escape": Fault("gptq", [f"../{ONE}", "expected a file inside the folder"],
                         harm=sharded(lambda index: index.update({f"{Q}.qweight": f"../{ONE}"}))),
    # F23: config and tensors
    "gptq said, awq stored": Fault("awq", [Q, "GPTQ, so qweight [8, 64]", "qweight int32 [64, 8]", "fits 4-bit AWQ"],
                                   change=says(quant_method="gptq", sym=True, desc_act=False)),
    "awq said, gptq stored": Fault("gptq", [Q, "AWQ (gemm), so qweight [64, 8]", "qweight int32 [8, 64]", "fits GPTQ"],
                                   change=says(quant_method="awq")),
    "fp8 said, gptq stored": Fault("gptq", [Q, "config: an FP8 or a plain weight", "qweight int32 [8, 64]"],
                                   change=says(quant_method="fp8", bits=None, group_size=None, sym=None)),
    "gptq said, fp8 stored": Fault("fp8", [Q, "config: a qweight or a plain weight", "weight float8_e4m3fn [64, 64]"],
                                   change=says(quant_method="gptq", bits=4, group_size=32)),
    "gptq said, ct stored": Fault("ct", [Q, "quantized, so a qweight", "weight_packed int32 [64, 8]"],
                                  change=says(quant_method="gptq", bits=4, group_size=32, format=None)),
    "ct said, gptq stored": Fault("gptq", [Q, "config: compressed-tensors", "qweight int32 [8, 64]"],
                                  change=model_says(quantization_config=CT)),
    "nothing said, gptq stored": Fault("gptq", [FILE, "self_attn.q_proj.weight", "qweight", "quantization_config"],
                                       change=lambda c: c.config.pop("quantization_config")),
    "nothing said, fp8 stored": Fault("fp8", [FILE, "q_proj.weight", "found F8_E4M3 [64, 64]", "quantization_config"],
                                      change=lambda c: c.config.pop("quantization_config")),
    "gptq group size": Fault("gptq", [Q, "group size 64, so 1 rows", "fit group size 32"], change=says(group_size=64)),
    "awq group size": Fault("awq", [Q, "group size 16, so 4 rows", "fit group size 32"], change=says(group_size=16)),
    "ct group size": Fault("ct", [Q, "per group of 16", "so weight_scale [64, 4]", "weight_scale bfloat16 [64, 2]"],
                           change=weights_say(group_size=16)),
    "fp8 blocks": Fault("fp8", [Q, "blocks of [32, 32]: a float scale [2, 2]", "weight_scale float32 []"],
                        change=says(weight_block_size=[32, 32])),
    "gptq order unsaid": Fault("gptq", [ATTN, "q_proj", "desc_act false", "a g_idx that is not k // group_size"],
                               change=put(q_proj__g_idx=lambda t: t.flip(0)), unseen=True),
    "gptq order beyond the groups": Fault("gptq", [Q, "a group that does not exist", "0 to 2", "0 to 1"],
                                          change=both(put(q_proj__g_idx=filled(2)), says(desc_act=True)), unseen=True),
    "gptq order not stored": Fault("gptq", [Q, "has no g_idx"],
                                   change=both(put(q_proj__g_idx=gone), says(desc_act=True))),
    "ct order not stored": Fault("ct", [Q, "with g_idx", "so weight_g_idx [64]"], change=weights_say(actorder="group")),
    "ct order unsaid": Fault("ct", [Q, "without g_idx, so weight_g_idx none", "weight_g_idx int32 [64]"],
                             change=put(q_proj__weight_g_idx=lambda _: torch.arange(64).int() // 32)),
    "gptq bits": Fault("gptq", [Q, "8-bit GPTQ, so qweight [16, 64]", "fits 4-bit GPTQ"], change=says(bits=8)),
    "awq bits": Fault("awq", ["quantization config: bits 8 is not implemented", "known: 4"], change=says(bits=8)),
    "ct bits": Fault("ct", [Q, "int8", "so weight_packed [64, 16]", "int32 [64, 8]"], change=weights_say(num_bits=8)),
    "ct shape": Fault("ct", [ATTN, "q_proj", "config: [64, 64]; stored: [65, 65]"],
                      change=put(q_proj__weight_shape=lambda t: t + 1), unseen=True),
    "gptq packing": Fault("gptq", ["checkpoint_format 'marlin' is not implemented", "gptq, gptq_v2"],
                          change=says(checkpoint_format="marlin")),
    "awq packing": Fault("awq", ["version 'gemv' is not implemented", "gemm"], change=says(version="gemv")),
    "gptq qzeros": Fault("gptq", [Q, "has no qzeros"], change=both(put(q_proj__qzeros=gone), says(sym=False))),
    "awq qzeros": Fault("awq", [Q, "has no qzeros", "qweight int32 [64, 8]"], change=put(q_proj__qzeros=gone)),
    "ct zeros": Fault("ct", [Q, "asymmetric", "so weight_zero_point [8, 2]"], change=weights_say(symmetric=False)),
    **{
        f"{form} scales": Fault(form, [Q, words], change=put(**{f"q_proj__{name}": gone}))
        for form, name, words in (("gptq", "scales", "has no scales"), ("awq", "scales", "has no scales"),
                                  ("fp8", "weight_scale", "exactly one of weight_scale, weight_scale_inv, scale"),
                                  ("ct", "weight_scale", "so weight_scale [64, 2]"))
    },
    "gptq codes": Fault("gptq", [Q, "quantized, so a qweight", "scales float16"], change=put(q_proj__qweight=gone)),
    "gptq inputs not divisible": Fault("gptq", ["0.mlp.down_proj", "packs 8 inputs together", "100 inputs"],
                                       change=uneven(100)),
    "awq inputs not divisible": Fault("awq", ["0.mlp.down_proj", "whole groups of 32 inputs", "104 inputs"],
                                      change=uneven(104)),
    "ct inputs not divisible": Fault("ct", ["0.mlp.down_proj", "so weight_packed [64, 13]", "int32 [64, 12]"],
                                     change=uneven(104)),
    "another vocabulary": Fault("gptq", [FILE, "model.embed_tokens.weight", "[304, 64]", "found F32 [300, 64]"],
                                change=model_says(vocab_size=304)),
    # F24: the tokenizer
    "tokenizer beyond the embedding": Fault("gptq", ["tokenizer", "token id", "ends at 249"],
                                            change=fewer_rows, unseen=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_error_says_where_and_what(name, quantized, tmp_path, capsys):
    fault = FAULTS[name]
    checkpoint = quantized(fault.form)
    fault.change(checkpoint)
    folder = str(checkpoint.write(tmp_path))
    fault.harm(tmp_path)
    capsys.readouterr()
    assert main(["generate", folder, "-p", "x", *PLAIN]) == 3
    printed = capsys.readouterr()
    assert [word for word in fault.words if word not in printed.err] == [], printed.err
    assert not printed.out and printed.err.count("error:") == 1
    assert main(["inspect", folder, *PLAIN[:4]]) == (0 if fault.unseen else 3)
    printed = capsys.readouterr()
    assert fault.unseen or fault.words[0] in printed.out + printed.err


settings_of_any_kind = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.sampled_from(["", "4", "gptq", "re:("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weights", "bits"]), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_setting_is_refused_or_runs(form, data, quantized, load, tmp_path):
    """A value of quantization_config, at any depth, replaced by anything that JSON can say."""
    checkpoint = quantized(form)
    at, place = checkpoint.settings, None
    while isinstance(at, dict) and at and (place is None or data.draw(st.booleans())):
        above, place = at, data.draw(st.sampled_from(sorted(at)))
        at = above[place]
    above[place] = data.draw(settings_of_any_kind)
    try:
        load(checkpoint.write(tmp_path))
    except NybbleError as error:
        assert 2 <= error.exit_code <= 6


@pytest.mark.parametrize("form", FORMS)
def test_sound_ones_run(form, quantized, tmp_path, capsys):
    """Also in shards; a tokenizer with fewer tokens than the embedding has rows is no fault."""
    folder = quantized(form).write(tmp_path)
    for change in (lambda folder: None, sharded()):
        change(folder)
        assert main(["generate", str(folder), "-p", "x", "--max-tokens", "2", *PLAIN]) == 0
        assert main(["inspect", str(folder), *PLAIN[:4]]) == 0


def test_a_shard_too_many_is_left_out_with_a_warning(quantized, tmp_path, capsys, caplog, load):
    folder = quantized("gptq").write(tmp_path)
    sharded()(folder)
    save_file({f"{Q}.qweight": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")
    assert main(["inspect", str(folder), *PLAIN[:4]]) == 0
    assert "model-00003-of-00003.safetensors: nothing refers to this file" in capsys.readouterr().out
    load(folder)
    assert "nothing refers to them: model-00003-of-00003.safetensors" in caplog.text


def test_denormal_scales_are_used_and_shown(quantized, tmp_path, capsys):
    """A scale below float16's normal numbers is a number like any other, though few meant it."""
    checkpoint = quantized("gptq")
    put(q_proj__scales=filled(2.0**-20))(checkpoint)
    folder = str(checkpoint.write(tmp_path))
    assert main(["generate", folder, "-p", "x", "--max-tokens", "2", *PLAIN]) == 0
    capsys.readouterr()
    assert main(["inspect", folder, *PLAIN[:4]]) == 0
    assert f"{FILE}: {Q}.scales: 1 denormal of 128 scales" in capsys.readouterr().out
