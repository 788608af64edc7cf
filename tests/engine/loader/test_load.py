"""What loaders put into memory, and the account they give of it."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nybble.engine.loader import safetensors_loader
from nybble.engine.loader.dummy_loader import DummyLoader
from nybble.engine.loader.ledger import Ledger
from nybble.engine.loader.progress import LINE_SECONDS, Lines, byte_progress
from nybble.engine.loader.safetensors_loader import SafetensorsLoader
from nybble.engine.loader.scan import scan
from nybble.plugins.errors import CheckpointError
from nybble.quant.base import LayerShape, Part, Slot, Unquantized, WeightSpec, part_slots

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Model:
    def __init__(self, *slots, ignored=()):
        self._slots, self.ignored_tensors = slots, dict.fromkeys(ignored, "no use")

    def slots(self):
        yield from self._slots


def load(folder, *slots, ignored=(), progress=False):
    return SafetensorsLoader().load(Model(*slots, ignored=ignored), folder, seed=0, progress=progress)


def dummy(*slots, seed=0):
    return DummyLoader().load(Model(*slots), None, seed=seed, progress=False)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("buffer_bytes", [1, 40, 1 << 20])
def test_every_kind_of_tensor_arrives_whatever_the_buffer(buffer_bytes, device, tmp_path, monkeypatch):
    for name in ("HOST", "CUDA"):
        ring = getattr(safetensors_loader, name)
        monkeypatch.setattr(safetensors_loader, name, replace(ring, size=buffer_bytes))
    stored = {
        "scalar": torch.tensor(3.5),
        "vector": torch.randn(7),
        "narrow": torch.randn(5, 3).bfloat16(),
        "wide": torch.randn(2, 1000),
        "deep": torch.randn(3, 4, 5, dtype=torch.float64),
        "packed": torch.randint(-(2**31), 2**31 - 1, (6, 4), dtype=torch.int32),
        "fp8": torch.randn(9, 4).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
    }
    save_file(stored, tmp_path / "model.safetensors")
    slots = [Slot(name=name, target=torch.zeros_like(value, device=device), sources=(value.dtype,))
             for name, value in stored.items()]
    report = load(tmp_path, *slots)
    for slot in slots:
        assert torch.equal(slot.target.cpu().float(), stored[slot.name].float()), slot.name
    assert report.loaded == tuple(stored)
    assert report.bytes_read == sum(value.nbytes for value in stored.values())
    assert report.files == ("model.safetensors",)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_converted(source, target, tmp_path):
    values = torch.randn(33, 5).to(source)
    save_file({"w": values}, tmp_path / "model.safetensors")
    slot = Slot(name="w", target=torch.empty(33, 5, dtype=target))
    load(tmp_path, slot)
    assert torch.equal(slot.target, values.to(target))


@pytest.mark.parametrize("out_dim", [0, 1])
def test_parts_of_a_fused_layer_lie_side_by_side(out_dim, tmp_path):
    parts = (Part(name="q", size=4), Part(name="k", size=2))
    shape = LayerShape(in_features=3, parts=parts)
    whole = torch.randn((6, 3) if out_dim == 0 else (3, 6))
    pieces = whole.split([p.size for p in parts], out_dim)
    save_file({f"attn.{p.name}.weight": piece.contiguous() for p, piece in zip(parts, pieces)},
              tmp_path / "model.safetensors")
    fused = torch.empty_like(whole)
    specs = {"weight": WeightSpec(shape=tuple(whole.shape), dtype=whole.dtype, out_dim=out_dim)}
    load(tmp_path, *part_slots("attn", shape, specs, {"weight": fused}))
    assert torch.equal(fused, whole)


def test_parameters_are_filled_in_place(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(2))
    load(tmp_path, Slot(name="w", target=parameter))
    assert torch.equal(parameter.data, torch.ones(2))
    assert parameter.requires_grad


def test_shards_with_index_without_and_one_file_are_equal(tmp_path):
    stored = {f"layers.{i}.w": torch.randn(4, 4) for i in range(6)}
    halves = [dict(list(stored.items())[::2]), dict(list(stored.items())[1::2])]
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {"total_size": 0}, "weight_map": {k: names[i % 2] for i, k in enumerate(stored)}}
    results = []
    for kind in ("single", "plain", "indexed"):
        folder = tmp_path / kind
        folder.mkdir()
        for name, half in [("model.safetensors", stored)] if kind == "single" else zip(names, halves):
            save_file(half, folder / name)
        save_file({"stray": torch.ones(1)}, folder / "consolidated.safetensors")  # never read beside others
        if kind == "indexed":
            folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))
            save_file({"stray": torch.ones(1)}, folder / "not-in-index.safetensors")
        slots = [Slot(name=name, target=torch.empty(4, 4)) for name in stored]
        report = load(folder, *slots)
        assert report.files == (("model.safetensors",) if kind == "single" else tuple(names))
        results.append(torch.stack([slot.target for slot in slots]))
    assert torch.equal(results[0], torch.stack(list(stored.values())))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_links_of_the_hugging_face_cache_are_followed_and_no_further(tmp_path):
    def cache(repository, blob):
        snapshot = tmp_path / repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        snapshot.joinpath("model.safetensors").symlink_to(blob)
        return snapshot

    for repository in ("models--org--name", "plain"):
        blobs = tmp_path / repository / "blobs"
        blobs.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, blobs / "0123")
    own = cache("models--org--name", "../../blobs/0123")
    slot = Slot(name="w", target=torch.zeros(2))
    load(own, slot)
    assert torch.equal(slot.target, torch.ones(2))
    foreign = {"models--org--other": "../../../models--org--name/blobs/0123", "plain": "../../blobs/0123"}
    for repository, blob in foreign.items():
        with pytest.raises(CheckpointError, match=r"inside the folder, found a link to .*blobs/0123"):
            scan(cache(repository, blob))


def test_headers_read_as_the_library_reads_them(shared_fixtures):
    for file in sorted(shared_fixtures.glob("*/model.safetensors")):
        with safe_open(file, "pt") as library:
            slices = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118
            expected = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
        tensors = scan(file.parent).tensors
        assert {name: (info.dtype, list(info.shape)) for name, info in tensors.items()} == expected, file


def test_account_of_a_load(tmp_path):
    shared = torch.zeros(2, 2)
    slots = [Slot(name="w", target=shared), Slot(name="head", target=shared, alias=True),
             Slot(name="tail", target=shared, alias=True),
             Slot(name="scale", target=torch.ones(1), optional=True)]
    save_file({"w": torch.eye(2), "head": torch.eye(2).half(), "rope.0.inv_freq": torch.ones(3)},
              tmp_path / "model.safetensors")
    report = load(tmp_path, *slots, ignored=[r"rope\.\d+\.inv_freq"])
    assert (report.loaded, report.derived, report.defaulted, report.ignored) == (
        ("w",), ("head", "tail"), ("scale",), ("rope.0.inv_freq",))
    assert report.bytes_read == 16 + 8  # the stored copy of a tied weight is read to be compared
    assert slots[3].target.item() == 1
    with pytest.raises(CheckpointError, match=r"rope\.0\.inv_freq"):
        load(tmp_path, *slots, ignored=[r"rope"])  # a rule is for whole names
    with pytest.raises(AssertionError, match="two slots are named w"):
        Ledger([slots[0], slots[0]], {})


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dummy_weights_depend_on_seed_and_name_alone(device):
    def make(*names, seed=0):
        slots = [Slot(name=name, target=torch.empty(64, 256, device=device)) for name in names]
        dummy(*slots, seed=seed)
        return {slot.name: slot.target for slot in slots}

    first, again = make("a", "b"), make("b", "a")
    assert torch.equal(first["a"], again["a"])
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], make("a", seed=1)["a"])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dummy_weights_are_sane(device):
    def values(name, *shape, dtype=torch.float32, **more):
        slot = Slot(name=name, target=torch.full(shape, 7, device=device).to(dtype), **more)
        report = dummy(slot)
        assert (name in report.loaded) != bool(more)
        return slot.target

    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        matrix = values("q_proj.weight", 400, 256, dtype=dtype).float()
        assert matrix.std().item() == pytest.approx(1 / 16, rel=0.05)
        assert abs(matrix.mean().item()) < 0.002
    assert (values("model.layers.0.input_layernorm.weight", 8, dtype=torch.bfloat16) == 1).all()
    assert 0 < values("q_proj.bias", 512).abs().max() < 0.2
    assert (values("down_proj.weight_scale") > 0).all()
    packed = values("q_proj.qweight", 300, 100, dtype=torch.int32)
    assert packed.min() < -(2**30)
    assert packed.max() > 2**30
    assert len(packed.unique()) > 29_000
    assert (values("q_proj.g_idx", 16, dtype=torch.int32) == 0).all()
    assert (values("head.weight", 2, 2, alias=True) == 7).all()
    assert (values("k_scale", 1, optional=True) == 7).all()


def test_dummy_weights_fill_views_only():
    fused = torch.zeros(4, 8)
    dummy(Slot(name="w", target=fused.narrow(1, 2, 3)))
    assert (fused[:, 2:5] != 0).all()
    assert (fused[:, :2] == 0).all()
    assert (fused[:, 5:] == 0).all()


def test_unquantized_layer_loads_through_its_own_specs(tmp_path):
    shape, method = LayerShape(in_features=3, parts=(Part(name="o", size=2),)), Unquantized()
    specs = method.specs(shape, torch.bfloat16)
    weights = {"weight": torch.empty(2, 3, dtype=torch.bfloat16)}
    save_file({"o.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    load(tmp_path, *part_slots("", shape, specs, weights))
    assert torch.equal(method.apply(weights, torch.ones(1, 3).bfloat16()), torch.full((1, 2), 3.0).bfloat16())


def test_progress_lines_come_every_ten_seconds(caplog):
    now = 0.0
    lines = Lines("loading", 8_000_000_000, clock=lambda: now)
    with caplog.at_level(logging.INFO, "nybble"):
        for second in range(25):
            now = float(second)
            lines(200_000_000)
    assert LINE_SECONDS == 10
    assert [record.getMessage() for record in caplog.records] == [
        "loading: 2.20 of 8.00 GB, 0.22 GB/s", "loading: 4.20 of 8.00 GB, 0.21 GB/s"]


@pytest.mark.parametrize(("enabled", "tty"), [(True, True), (True, False), (False, True)])
def test_bar_is_for_terminals(enabled, tty, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty)
    with byte_progress("loading weights", 2_000_000, enabled=enabled) as advance:
        advance(2_000_000)
    out = capsys.readouterr()
    assert ("loading weights" in out.err) == (enabled and tty)
    assert ("2.0/2.0 MB" in out.err) == (enabled and tty)
    assert out.out == ""
