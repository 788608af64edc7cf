"""Run a model of nybble alone: weights loaded strictly, cache paged, prompt in chunks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nybble.engine.attention.base import StepShape
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.loader.safetensors_loader import SafetensorsLoader
from nybble.engine.plan import KVCacheLayout
from nybble.models import Batch, Fields, Make
from nybble.plugins.manager import PluginHost

BLOCK = 4


@pytest.fixture(scope="session")
def forward_logits():
    """forward_logits(folder, ids, cuts) -> float32 logits [T, vocab], computing ids in chunks that end at `cuts`."""
    host = PluginHost.load(allow="")

    def run(folder: Path, ids: torch.Tensor, cuts: tuple[int, ...] = ()) -> torch.Tensor:
        raw = json.loads((folder / "config.json").read_text())
        make = Make(dtype=torch.float32, device=torch.device("cpu"), max_len=512)
        model = host.resolve("model", raw["architectures"][0])(Fields(raw, raw["architectures"][0]), make)
        SafetensorsLoader().load(model, folder, seed=0, progress=False)
        model.after_load()
        length = len(ids)
        blocks = -(-length // BLOCK)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).int()[None] + 1
        layout = KVCacheLayout(num_blocks=blocks + 1, block_size=BLOCK, groups=[])
        backend = TorchPagedBackend(model.attention_layers(), layout, dtype=torch.float32, device=torch.device("cpu"))
        for cache in backend.caches:
            cache.fill_(float("nan"))  # nothing unwritten may be read
        positions = torch.arange(length)
        slots = table[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
        logits = []
        for start, end in pairwise((0, *cuts, length)):
            step = StepShape(query_lens=np.array([end - start]), seq_lens=np.array([end]), block_table=table,
                             host_block_table=table.numpy(), slots=slots[start:end])
            with torch.inference_mode():
                hidden = model(Batch(ids=ids[start:end], positions=positions[start:end], attn=backend.prepare(step)))
                logits.append(model.compute_logits(hidden))
        return torch.cat(logits)

    return run
