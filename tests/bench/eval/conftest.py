"""A tiny Mixtral and its FP8 copy: what `nybble eval` compares in these tests."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.bench.eval.passages import Passage
from nybble.bench.eval.stream import Source
from nybble.engine.args import EngineArgs
from nybble.plugins.manager import PluginHost

MATRIX = re.compile(r"_proj\.weight|\.w[123]\.weight")
FILE = "model.safetensors"


def write(source: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(tensors, folder / FILE)
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.fixture(scope="session")
def reference(make_checkpoint) -> Path:
    return make_checkpoint("Mixtral", num_local_experts=8, num_experts_per_tok=2)


@pytest.fixture(scope="session")
def fp8(reference, tmp_path_factory):
    """fp8({tensor: factor}) -> (quantized checkpoint, the same in float32), with these scales multiplied."""

    def make(spoiled: dict[str, float] | None = None) -> tuple[Path, Path]:
        stored, dense = {}, load_file(reference / FILE)
        for name, weight in list(dense.items()):
            stored[name] = weight
            if MATRIX.search(name):
                scale = weight.abs().max() / 448
                stored[name] = (weight / scale).to(torch.float8_e4m3fn)
                stored[f"{name}_scale"] = scale * (spoiled or {}).get(f"{name}_scale", 1.0)
                dense[name] = stored[name].float() * stored[f"{name}_scale"]
        folder = tmp_path_factory.mktemp("fp8")
        quantization = {"quant_method": "fp8", "activation_scheme": None}
        return (write(reference, folder / "stored", stored, quantization_config=quantization),
                write(reference, folder / "dense", dense))

    return make


@pytest.fixture(scope="session")
def source():
    """source(folder) -> the checkpoint as eval reads it, in float32 on the CPU."""
    host = PluginHost.load(allow="")

    def read(folder: Path) -> Source:
        return Source(EngineArgs(model=str(folder), device="cpu").create_engine_config(host), host)

    return read


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    """Random sequences of two tasks, of several lengths, one of a single scored token."""
    rng = torch.Generator().manual_seed(0)
    lengths = (40, 2, 33, 21)
    return [Passage("ab"[i % 2], torch.randint(5, 261, (n,), generator=rng).tolist(), max(1, n // 3))
            for i, n in enumerate(lengths)]
