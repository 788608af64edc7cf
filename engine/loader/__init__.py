"""From a checkpoint folder to a model in memory, or one error that says everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models import CausalLM, Fields, Make
from ...moe import Experts
from ...plugins.errors import CheckpointError, UsageError
from ...plugins.manager import PluginHost
from ...quant import Found, Linear, QuantizationConfig, Stored, Unquantized, get_quantization_config
from ..config import EngineConfig
from ..layer_report import LayerReport
from .base import LoadReport, WeightLoader
from .kernels import linear_kernels, moe_backends
from .ledger import TORCH_DTYPES
from .scan import Checkpoint, scan

SAFETENSORS = "safetensors"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run, the account of its tensors, and that of its linear layers."""

    model: CausalLM
    report: LoadReport
    layers: tuple[LayerReport, ...]


def get_model(config: EngineConfig, host: PluginHost, device: torch.device) -> LoadedModel:
    """Build the architecture, fill every slot, let layers repack.

    Raises CheckpointError naming each field or tensor that does not fit; PluginError when a plugin's part is broken.
    """
    dtype = getattr(torch, config.model.dtype)
    folder = Path(config.model.model)
    loader_name = SAFETENSORS if config.load.load_format == "auto" else config.load.load_format
    quant = quantization(config, host)
    stored = stored_modules(scan(folder)) if loader_name == SAFETENSORS else None
    make = Make(dtype=dtype, device=device, max_len=config.model.max_model_len, quant=quant, stored=stored,
                kernels=linear_kernels(host, config.device.linear_backend),
                backends=moe_backends(host, config.device.moe_backend), count_experts=config.device.expert_stats)
    model_class = host.resolve("model", config.model.architecture)
    model = model_class(Fields(config.model.hf_config, config.model.architecture), make)
    if quant is not None:
        check_quantized(model, config)
        model.ignored_tensors = {**model.ignored_tensors, **quant.ignored_tensors}
    check_pins(model, config)
    loader: WeightLoader = host.resolve("loader", loader_name)()
    report = loader.load(model, folder, seed=config.model.seed, progress=config.load.use_tqdm)
    model.after_load()
    return LoadedModel(model=model.eval(), report=report, layers=tuple(layer_reports(model)))


def layer_reports(model: CausalLM) -> Iterator[LayerReport]:
    """The account of every linear layer, in module order."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            yield LayerReport(layer=layer.name, scheme=layer.scheme, kernel=layer.runs_by, bytes=layer.nbytes,
                              shape=(layer.shape.out_features, layer.shape.in_features),
                              refusals=dict(layer.refusals))


def check_pins(model: CausalLM, config: EngineConfig) -> None:
    """Raise UsageError for a pinned kernel or backend that nothing in the model would run: no flag is ignored."""
    experts = {id(layer) for m in model.modules() if isinstance(m, Experts) for layer in m.layers}
    pins = (
        ("--linear-backend", config.device.linear_backend, "quantized linear layer outside of experts",
         any(isinstance(m, Linear) and not m.method.plain and id(m) not in experts for m in model.modules())),
        ("--moe-backend", config.device.moe_backend, "layer of experts",
         any(isinstance(m, Experts) for m in model.modules())),
    )
    for flag, pin, what, there in pins:
        if pin is not None and not there:
            raise UsageError(f"{flag} {pin} was asked for, but the model has no {what}", fix=f"leave {flag} out")


def check_quantized(model: CausalLM, config: EngineConfig) -> None:
    """Raise CheckpointError when a method was named and no layer is stored by it: it would run unquantized, unsaid."""
    if all(isinstance(m.method, Unquantized) for m in model.modules() if isinstance(m, Linear)):
        raise CheckpointError(
            f"quantization {config.model.quantization} was asked for, but no layer is stored that way",
            found="floating point weights in every layer",
            fix="remove quantization_config, or fetch the checkpoint again",
        )


def quantization(config: EngineConfig, host: PluginHost) -> QuantizationConfig | None:
    """How the checkpoint is quantized, as its method's plugin reads it, or is to be quantized while it is loaded."""
    if config.model.quantization is None:
        return None
    method = get_quantization_config(config.model.quantization, host)
    if not config.model.quantization_config:
        return method.online()
    return method.from_checkpoint(config.model.quantization_config)


def stored_modules(checkpoint: Checkpoint) -> dict[str, Found]:
    """What the checkpoint stores of each module: {"model.layers.0.mlp.up_proj": {"qweight": Stored(...), ...}}."""
    modules: dict[str, dict[str, Stored]] = {}
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = Stored(TORCH_DTYPES.get(info.dtype), info.shape)
    return dict(modules)
