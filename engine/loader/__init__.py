"""From a checkpoint folder to a model in memory, or one error that says everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...models import CausalLM, Fields, Make
from ...plugins.errors import CheckpointError
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from .base import LoadReport, WeightLoader


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run and the account of its tensors."""

    model: CausalLM
    report: LoadReport


def get_model(config: EngineConfig, host: PluginHost, device: torch.device) -> LoadedModel:
    """Build the architecture, fill every slot, let layers repack.

    Raises CheckpointError naming each field or tensor that does not fit; PluginError when a plugin's part is broken.
    """
    if config.model.quantization is not None:
        raise CheckpointError("quantized weights are not implemented in this release",
                              found=f"quantization {config.model.quantization}",
                              fix="serve a checkpoint in 16 or 32 bits")
    dtype = getattr(torch, config.model.dtype)
    model_class = host.resolve("model", config.model.architecture)
    make = Make(dtype=dtype, device=device, max_len=config.model.max_model_len)
    model = model_class(Fields(config.model.hf_config, config.model.architecture), make)
    name = "safetensors" if config.load.load_format == "auto" else config.load.load_format
    loader: WeightLoader = host.resolve("loader", name)()
    report = loader.load(model, Path(config.model.model), seed=config.model.seed, progress=config.load.use_tqdm)
    model.after_load()
    return LoadedModel(model=model.eval(), report=report)
