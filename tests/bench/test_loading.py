"""`nybble bench load`: what it writes is what it loads, every case is timed, and a full disk is refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from nybble.bench import loading
from nybble.bench.loading import LoadArgs, Model, write_checkpoint
from nybble.bench.results import read_json
from nybble.engine.loader.safetensors_loader import fill
from nybble.plugins.errors import UsageError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(loading, "SIZE", 64)


def test_every_case_is_timed_beside_the_plain_read(tmp_path, capsys):
    out = tmp_path / "result.json"
    argv = ["--gigabytes", "1e-4", "--shards", "3", "--cases", "all", "--repeats", "2", "--folder", str(tmp_path),
            "--output-json", str(out)]
    assert loading.main(argv) == 0
    result = read_json(out)
    assert set(result.metrics) == {f"{kind}/{heat}" for kind in ("read", "copy", "convert", "fp8")
                                   for heat in ("cold", "warm")}
    assert all(metric.n == 2 and metric.min > 0 and metric.unit == "GB/s" for metric in result.metrics.values())
    assert list(tmp_path.iterdir()) == [out], "the checkpoint is removed again"
    assert "fp8/warm" in capsys.readouterr().out


@pytest.mark.parametrize("case", loading.CASES)
def test_what_is_written_is_loaded(case, tmp_path):
    checkpoint = write_checkpoint(tmp_path, LoadArgs(gigabytes=1e-4, shards=2))
    assert len(checkpoint.files) == 2
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == pytest.approx(1e5, rel=0.1)
    model = Model({name: info.shape for name, info in checkpoint.tensors.items()}, case, torch.device("cpu"))
    uses, nbytes = fill(model, checkpoint, progress=False)
    assert set(uses.loaded) == set(checkpoint.tensors) and nbytes > 9e4
    targets = [slot.target.float() for slot in model.slots()]
    assert all(target.any() for target in targets)


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: usage(free=10**6))
    with pytest.raises(UsageError, match=r"(?s)5.0 GB has no room in .*0.0 GB free.*--folder"):
        write_checkpoint(tmp_path, replace(LoadArgs(), gigabytes=5.0))
    assert not list(tmp_path.iterdir())
