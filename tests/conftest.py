"""Shared fixtures: tiny random checkpoints that transformers writes, and real quantizers' ones where at hand."""

from __future__ import annotations

import json
import logging
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in [n for n in os.environ if n.startswith("NYBBLE_")]:
    del os.environ[name]


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # before any kernel's module is imported
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def log_left_alone():
    """Entry points configure the package's logger, those in fixtures that outlive a test too; every test finds it as
    an import leaves it."""
    logger = logging.getLogger("nybble")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def whole_device() -> None:
    """For tests of how much of a device's memory a run finds free: skips where other processes hold some of it."""
    import torch

    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if others > 2 * 2**30:  # this process's context and kernels are not reserved memory, but take less than that
        pytest.skip(f"other processes hold {others / 2**30:.1f} GiB of the device: run this test by itself, -n 0")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Checkpoints written by real quantizers; not part of the repository."""
    folder = Path(os.environ.get("TEST_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}")
    return folder


TINY = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """make_checkpoint("Llama", **config) -> folder of a random float32 model that transformers wrote, with a tokenizer.

    The weights are scaled up from transformers' tiny initialisation so that argmax has clear winners.
    """
    import torch
    import transformers

    from nybble.models.demo.checkpoint import SPECIALS, write_tokenizer

    made: dict[str, Path] = {}

    def make(arch: str, *, seed: int = 0, shard: str | None = None, **settings: Any) -> Path:
        key = json.dumps([arch, seed, shard, settings], sort_keys=True)
        if key in made:
            return made[key]
        torch.manual_seed(seed)
        config = getattr(transformers, f"{arch}Config")(**{**TINY, **settings})
        model = getattr(transformers, f"{arch}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() >= 2:
                    weight.normal_(0, (4.0 if "lm_head" in name else 1.0) / weight.shape[-1] ** 0.5)
                elif name.endswith("bias"):
                    weight.normal_(0, 0.5)
                else:
                    weight.uniform_(0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0, 0.2)
        folder = tmp_path_factory.mktemp(arch.lower())
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        write_tokenizer(folder)
        assert len(SPECIALS) + 256 <= config.vocab_size
        made[key] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_checkpoint) -> Path:
    """The tiny random Llama most engine tests run."""
    return make_checkpoint("Llama")


@pytest.fixture(scope="session")
def stacked(tmp_path_factory: pytest.TempPathFactory):
    """stacked(folder) -> a copy whose experts are stacks, [E, 2 I, H] and [E, H, I], as transformers 5 holds them.

    Under other names, that is; `save_pretrained` takes them apart again.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    def make(folder: Path) -> Path:
        copy = tmp_path_factory.mktemp("stacked")
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        save_file(model.state_dict(), copy / "model.safetensors")
        return copy

    return make


@pytest.fixture(scope="session")
def transformers_greedy():
    """transformers_greedy(folder, prompts, n) -> what transformers' own greedy generate gives, one prompt at a time."""
    import torch
    import transformers

    models: dict[Path, Any] = {}

    def generate(folder: Path, prompts: list[list[int]], n: int) -> list[list[int]]:
        if folder not in models:
            models[folder] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            models[folder].generation_config.eos_token_id = None
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = models[folder].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                                              do_sample=False)
            outputs.append(out[0, len(prompt):].tolist())
        return outputs

    return generate


@pytest.fixture(scope="session")
def forward_logits():
    """forward_logits(folder, ids, cuts, device, **settings) -> float32 logits [T, vocab], in chunks ending at `cuts`.

    A model of nybble alone: loaded strictly, its cache paged and poisoned.
    """
    import numpy as np
    import torch

    from nybble.engine.args import EngineArgs
    from nybble.engine.attention.base import StepShape
    from nybble.engine.attention.torch_paged import TorchPagedBackend
    from nybble.engine.loader import get_model
    from nybble.engine.plan import KVCacheLayout
    from nybble.models import Batch
    from nybble.plugins.manager import PluginHost

    host, block = PluginHost.load(allow=""), 4

    def run(folder: Path, ids: Any, cuts: tuple[int, ...] = (), device: str = "cpu", **settings: Any) -> Any:
        args = EngineArgs(model=str(folder), device=device, skip_tokenizer_init=True, use_tqdm_on_load=False,
                          **{"dtype": "float32", **settings})
        place, dtype = torch.device(device), getattr(torch, args.dtype)
        model = get_model(args.create_engine_config(host), host, place).model
        length = len(ids)
        blocks = -(-length // block)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).int()[None] + 1
        layout = KVCacheLayout(num_blocks=blocks + 1, block_size=block, groups=[])
        backend = TorchPagedBackend(model.attention_layers(), layout, dtype=dtype, device=place)
        for cache in backend.caches:
            cache.fill_(float("nan"))  # nothing unwritten may be read
        positions = torch.arange(length)
        slots = table[0, positions // block].long() * block + positions % block
        logits = []
        for start, end in pairwise((0, *cuts, length)):
            step = StepShape(query_lens=np.array([end - start]), seq_lens=np.array([end]),
                             block_table=table.to(place), host_block_table=table.numpy(),
                             slots=slots[start:end].to(place), max_query_len=end - start,
                             query_start=torch.tensor([0, end - start]).int().to(place),
                             device_seq_lens=torch.tensor([end]).int().to(place))
            with torch.inference_mode():
                hidden = model(Batch(ids=ids[start:end].to(place), positions=positions[start:end].to(place),
                                     attn=backend.prepare(step)))
                logits.append(model.compute_logits(hidden).float().cpu())
        return torch.cat(logits)

    return run
