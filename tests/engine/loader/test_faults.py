"""Every way a checkpoint can be wrong: one CheckpointError that names file, tensor, expected and found."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nybble.engine.loader import safetensors_loader
from nybble.engine.loader.safetensors_loader import SafetensorsLoader
from nybble.engine.loader.scan import scan
from nybble.engine.loader.weight_file import WeightFile
from nybble.plugins.errors import CheckpointError
from nybble.quant.base import Slot

A, B, HEAD = "layers.0.a", "layers.1.b", "head"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Model:
    def __init__(self):
        self.ignored_tensors = {r"layers\.\d+\.inv_freq": "recomputed"}
        self.a, self.b = torch.zeros(4, 2), torch.zeros(3)

    def slots(self):
        yield Slot(name=A, target=self.a)
        yield Slot(name=B, target=self.b, sources=(torch.float32,))
        yield Slot(name=HEAD, target=self.a, alias=True)


def good():
    return {A: torch.arange(8.0).view(4, 2), B: torch.ones(3)}


def load(folder):
    model = Model()
    SafetensorsLoader().load(model, folder, seed=0, progress=False)
    return model


def write(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    folder.joinpath(FILE).write_bytes(size + text + data)


def entry(dtype="F32", shape=(4, 2), span=(0, 32)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def pair(a=None, b=None, data=bytes(44)):
    """A file of A (32 bytes) and B (12 bytes) with one entry replaced."""
    return lambda folder: write(folder, {A: a or entry(), B: b or entry(shape=[3], span=[32, 44])}, data)


def raw(header, data=b"", length=None):
    return lambda folder: write(folder, header, data, length)


def content(text, name=FILE):
    return lambda folder: folder.joinpath(name).write_bytes(text)


def tensors(change=None, **more):
    return lambda folder: save_file({**good(), **(change or {}), **more}, folder / FILE)


def without(name):
    return lambda folder: save_file({k: v for k, v in good().items() if k != name}, folder / FILE)


def sharded(weight_map, shards=None):
    """Shards one.safetensors (A) and two.safetensors (B), and an index that may say something else."""
    def build(folder):
        for name, shard in (shards or {"one": {A: good()[A]}, "two": {B: good()[B]}}).items():
            save_file(shard, folder / f"{name}.safetensors")
        folder.joinpath(INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return build


def outside(name):
    """A sound file beside the folder, and a link to it inside."""
    def build(folder):
        save_file(good(), folder.parent / "elsewhere.safetensors")
        folder.joinpath(name).symlink_to("../elsewhere.safetensors")
    return build


def renamed(name):
    return lambda folder: (tensors()(folder), folder.joinpath(FILE).rename(folder / name))


ONE, TWO = "one.safetensors", "two.safetensors"
DEEP = b"[" * 100_000
FAULTS = {
    # name: (how to write the folder, what the message must say)
    "truncated length": (content(b"\x08\0\0"), [FILE, "a file of 16 bytes", "3: truncated"]),
    "truncated header": (raw(b'{"a":', length=500), [FILE, "508 bytes or more", "13: truncated"]),
    "truncated data": (pair(data=bytes(40)), [FILE, B, "bytes", "truncated"]),
    "trailing garbage": (pair(data=bytes(50)), [FILE, f"after {B}", "6 bytes more"]),
    "overlap": (pair(b=entry(shape=[3], span=[28, 40])), [FILE, B, f"after {A}", "overlaps"]),
    "hole": (pair(b=entry(shape=[3], span=[36, 48]), data=bytes(48)), [FILE, B, f"after {A}", "a hole"]),
    "wrong product": (pair(b=entry(shape=[4], span=[32, 44])),
                      [FILE, B, "16 bytes of data for F32 [4]", "found 12"]),
    "product overflow": (pair(b=entry(shape=[2**40, 2**40, 0], span=[32, 32])), [FILE, B, "2^63", "0]"]),
    "backward offsets": (pair(b=entry(shape=[3], span=[44, 32])), [FILE, B, "[begin, end]", "[44, 32]"]),
    "unknown dtype": (pair(b=entry("F128", [3], [32, 44])), [FILE, B, "BF16", "'F128'", " 1 problem\n"]),
    "dtype no text": (pair(b=entry(["F32"], [3], [32, 44])), [FILE, B, "BF16", "['F32']"]),
    "negative dim": (pair(b=entry(shape=[-3], span=[32, 44])), [FILE, B, "a shape", "[-3]"]),
    "bool as dim": (pair(b=entry(shape=[True], span=[32, 36])), [FILE, B, "a shape", "[True]"]),
    "half a byte": (pair(b=entry("F4", [3], [32, 34])), [FILE, B, "1.5 bytes", "found 2"]),
    "field missing": (pair(b={"dtype": "F32"}), [FILE, B, "data_offsets, dtype, shape", "{'dtype': 'F32'}"]),
    "entry no object": (pair(b=7), [FILE, B, "an object", "found 7"]),
    "duplicate key": (raw(b'{"x":1,"x":2}'), [FILE, "duplicate key x"]),
    "duplicate field": (raw(b'{"x":{"dtype":"F32","dtype":"F16"}}'), [FILE, "duplicate key dtype"]),
    "header bomb": (raw(b"{}", length=2**26), [FILE, "header of at most 33554432", "67108864"]),
    "depth bomb": (raw(DEEP), [FILE, "JSON", "too deeply"]),
    "huge number": (raw(b'{"x":' + b"9" * 5000 + b"}"), [FILE, "JSON", "limit"]),
    "NaN": (raw(b'{"x":NaN}'), [FILE, "JSON", "NaN"]),
    "not UTF-8": (raw(b'{"\xff":1}'), [FILE, "JSON", "utf-8"]),
    "header no object": (raw(b"[1]"), [FILE, "JSON object", "[1]"]),
    "metadata no text": (raw({"__metadata__": {"a": 1}}), [FILE, "__metadata__", "{'a': 1}"]),
    "hostile name": (raw({"\x1b[2J\ud800": 1}), [FILE, r"'\x1b[2J\ud800'", "an object", "found 1"]),
    "LFS pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), [FILE, "git lfs pull"]),
    "LFS index": (content(b"version https://git-lfs.github.com/spec/v1\n", INDEX), [INDEX, "git lfs pull"]),
    "missing tensor": (without(B), [FILE, B, "expected F32 [3]", f"nothing in {FILE}"]),
    "surplus tensor": (tensors({"layers.1.c": torch.ones(5)}),
                       [FILE, "layers.1.c", "expected no such tensor", "found F32 [5]"]),
    "wrong shape": (tensors({B: torch.ones(4)}), [FILE, B, "expected F32 [3]", "found F32 [4]"]),
    "transposed": (tensors({A: torch.ones(2, 4)}),
                   [FILE, A, "expected F32 or F16 or BF16 [4, 2]", "found F32 [2, 4]"]),
    "wrong dtype": (tensors({A: torch.ones(4, 2, dtype=torch.int32)}),
                    [FILE, A, "expected F32 or F16 or BF16 [4, 2]", "found I32 [4, 2]"]),
    "narrower dtype": (tensors({B: torch.ones(3).half()}), [FILE, B, "expected F32 [3]", "found F16 [3]"]),
    "tied mismatch": (tensors({HEAD: torch.zeros(4, 2)}),
                      [FILE, HEAD, f"the values of {A}", "7 of 8 different"]),
    "index names a missing file": (sharded({A: ONE, B: "three.safetensors"}),
                                   ["three.safetensors", "readable file", "No such file"]),
    "index names a missing tensor": (sharded({A: ONE, B: TWO, "c": TWO}),
                                     [TWO, "c", f"it here, as {INDEX} says", "no such tensor"]),
    "index names the wrong file": (sharded({A: TWO, B: TWO}), [TWO, A, INDEX, "no such tensor"]),
    "tensor not in index": (sharded({A: ONE, B: TWO}, {"one": {A: good()[A], "c": torch.ones(1)},
                                                       "two": {B: good()[B]}}),
                            [ONE, "c", f"only tensors that {INDEX} names", "F32 [1]"]),
    "one tensor in two files": (sharded({A: ONE, B: TWO}, {"one": {A: good()[A]}, "two": good()}),
                                [f"{ONE} and {TWO}", A, "in one file", "it in both"]),
    "path up in index": (sharded({A: "../one.safetensors"}), ["inside the folder", "../one.safetensors"]),
    "absolute path in index": (sharded({A: "/etc/passwd"}), ["inside the folder", "/etc/passwd"]),
    "no path in index": (sharded({A: "\0"}), [r"'\x00'", "readable file", "null"]),
    "number in index": (sharded({A: 1}), [INDEX, "weight_map", "{'layers.0.a': 1}"]),
    "index no JSON": (content(b"{", INDEX), [INDEX, "JSON", "line 1"]),
    "index empty": (sharded({}), [INDEX, "weight_map", "{'weight_map': {}}"]),
    "link to outside": (outside(FILE), [FILE, "inside the folder", "elsewhere.safetensors"]),
    "dangling link": (lambda f: f.joinpath(FILE).symlink_to("gone"), [FILE, "readable file", "No such file"]),
    "link to itself": (lambda f: f.joinpath(FILE).symlink_to(FILE), [FILE, "readable file", FILE]),
    "a pipe": (lambda f: os.mkfifo(f / FILE), [FILE, "regular file", "prw"]),
    "a folder": (lambda f: f.joinpath(FILE).mkdir(), [FILE, "regular file", "drwx"]),
    "shard missing, no index": (renamed("model-00002-of-00003.safetensors"),
                                ["model-00001-of-00003.safetensors", "expected 3 shards", "'00003'"]),
    "pickle only": (content(b"", "pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "state dict only": (content(b"", "consolidated.00.pth"), ["consolidated.00.pth", "save_file"]),
    "GGUF only": (content(b"", "model.gguf"), ["model.gguf", "gguf_file"]),
    "empty folder": (lambda f: None, ["has no weight files", "0 other files", FILE]),
    "no folder": (lambda f: f.rmdir(), ["not a folder that can be read", "No such file"]),
}


@pytest.mark.parametrize(("build", "words"), FAULTS.values(), ids=FAULTS)
def test_fault_is_named(build, words, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\x1b" not in message


def test_sound_checkpoint_passes_where_the_faults_fail(tmp_path):
    pair()(tmp_path)
    assert set(scan(tmp_path, max_tensors=2).tensors) == {A, B}
    with pytest.raises(CheckpointError, match=rf"{FILE}: expected at most 1 tensors, found 2"):
        scan(tmp_path, max_tensors=1)
    tensors({HEAD: good()[A], "layers.7.inv_freq": torch.ones(1)})(tmp_path)
    assert torch.equal(load(tmp_path).a, good()[A])


def test_all_faults_come_in_one_error_and_repeats_on_one_line(tmp_path):
    save_file({f"layers.{i}.mlp.experts.{j}.b": torch.ones(2) for i in range(3) for j in range(4)}
              | {f"odd{'x' * i}": torch.ones(1) for i in range(40)} | {A: torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="54 problems") as caught:
        load(tmp_path)
    message = str(caught.value)
    for part in (f"{B}: expected F32 [3], found nothing in {FILE}", f"{A}: expected F32 or", "found F32 [1]",
                 "layers.0..2.mlp.experts.0..3.b (12 tensors): expected no such tensor, found F32 [2]",
                 "and 23 more lines"):
        assert part in message
    assert len(message.splitlines()) == 1 + 20 + 1 + 1  # headline, lines, the rest counted, what to do


def test_missing_tensor_is_paired_with_its_misspelling(tmp_path):
    save_file({"model.layers.0.a": good()[A], B: good()[B]}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"layers\.0\.a: .*but model\.layers\.\*\.a is there"):
        load(tmp_path)


@pytest.mark.parametrize(("watched", "found"), [(True, r": expected .* found \d+ bytes, written since"),
                                                (False, rf": {B}: expected .* found its end at byte \d+")])
def test_file_that_shrinks_after_the_scan_is_an_error(watched, found, tmp_path, monkeypatch):
    tensors()(tmp_path)
    if not watched:  # as when it shrinks after the check
        monkeypatch.setattr(WeightFile, "_check", lambda file: None)

    def scan_then_cut(folder):
        checkpoint = scan(folder)
        with (tmp_path / FILE).open("r+b") as handle:
            handle.truncate(checkpoint.files[0].size - 4)
        return checkpoint

    monkeypatch.setattr(safetensors_loader, "scan", scan_then_cut)
    with pytest.raises(CheckpointError, match=FILE + found):
        load(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_file(good(), folder / FILE, metadata={"format": "pt"})
    return folder / FILE


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@example(flips=[(3, 255)])
def test_flipped_bytes_are_refused_or_change_no_shape(flips, sound, tmp_path):
    text = bytearray(sound.read_bytes())
    end = 8 + int.from_bytes(text[:8], "little")
    for place, byte in flips:
        text[place % end] = byte
    Path(tmp_path / FILE).write_bytes(text)
    try:
        checkpoint = scan(tmp_path)
        load(tmp_path)
    except CheckpointError as error:
        assert FILE in str(error)
    else:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {A: (4, 2), B: (3,)}


def objects(values):
    return st.dictionaries(st.text(max_size=5), values, max_size=3)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | objects(inner), max_leaves=12,
)
sizes = st.lists(st.integers(-1, 9) | st.integers(0, 2**64), max_size=3)
entries = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F4", "I8", "X"]) | json_values,
                                 "shape": sizes | json_values, "data_offsets": sizes | json_values})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=objects(entries | json_values) | json_values, index=objects(st.text(max_size=5)) | json_values)
@example(header={"x": entry("I8", [8], [0, 8])}, index={"x": FILE})
def test_any_json_is_refused_or_covers_the_file(header, index, tmp_path):
    write(tmp_path, header, bytes(8))
    try:
        checkpoint = scan(tmp_path)
    except CheckpointError as error:
        assert FILE in str(error)
    else:
        assert sum(info.nbytes for info in checkpoint.tensors.values()) == 8
    bad = tmp_path / "indexed"
    bad.mkdir(exist_ok=True)
    bad.joinpath(INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError):
        scan(bad)
