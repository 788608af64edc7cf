"""What a checkpoint is, from headers alone: architecture, method of every layer, bytes by role, what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import CausalLM, Fields, Make
from ..moe import MoEBlock
from ..plugins.errors import CheckpointError
from ..plugins.manager import PluginHost
from ..quant import Linear
from . import hf_config
from .config import EngineConfig
from .loader import check_quantized, quantization, stored_modules
from .loader.ledger import TORCH_DTYPES, Ledger
from .loader.scan import Checkpoint, scan


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear layer: its checkpoint matrices, its method and scheme, and the bytes it keeps."""

    name: str
    parts: tuple[str, ...]
    method: str
    scheme: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The account of a checkpoint. `problems` are what loading would refuse; `findings` what deserves a look.

    `kv_scales` are the stored scales of an FP8 KV cache: loaded, and used with --kv-cache-dtype fp8.
    """

    folder: str
    architecture: str
    quantization: str | None
    evidence: str | None
    files: tuple[str, ...]
    file_bytes: int
    layers: tuple[Layer, ...]
    bytes_by_role: dict[str, int]
    kv_scales: tuple[str, ...]
    problems: tuple[str, ...]
    findings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(config: EngineConfig, host: PluginHost) -> Inspection:
    """Build the model without memory (torch's meta device) and match it with the headers.

    Raises CheckpointError for what keeps a model from being built at all: broken files, an unknown config field.
    """
    folder = Path(config.model.model)
    checkpoint = scan(folder)
    quant = quantization(config, host)
    make = Make(dtype=getattr(torch, config.model.dtype), device=torch.device("meta"), max_len=1, quant=quant,
                stored=stored_modules(checkpoint))
    model_class = host.resolve("model", config.model.architecture)
    model: CausalLM = model_class(Fields(config.model.hf_config, config.model.architecture), make)
    if quant is not None:
        check_quantized(model, config)
    ignored = {**model.ignored_tensors, **(quant.ignored_tensors if quant else {})}
    ledger, problems = Ledger(model.slots(), ignored), []
    try:
        ledger.match(checkpoint)
    except CheckpointError as error:
        problems = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
    findings = [f"{name}: nothing refers to this file" for name in checkpoint.unused]
    for scale in odd_scales(checkpoint):
        (problems if scale.wrong and scale.tensor in ledger.slots else findings).append(str(scale))
    evidence = hf_config.quantization_settings(config.model.hf_config, folder)
    return Inspection(
        folder=str(folder), architecture=config.model.architecture, quantization=config.model.quantization,
        evidence=evidence.origin if evidence else None, files=tuple(f.name for f in checkpoint.files),
        file_bytes=sum(f.size for f in checkpoint.files), layers=tuple(linear_layers(model)),
        bytes_by_role=bytes_by_role(model), problems=tuple(problems), findings=tuple(findings),
        kv_scales=tuple(slot.name for layer in model.attention_layers() for slot in layer.slots()
                        if slot.name in checkpoint.tensors),
    )


def linear_layers(model: CausalLM) -> list[Layer]:
    """Every linear layer of a model, in module order."""
    layers = []
    for module in model.modules():
        if isinstance(module, Linear):
            parts = tuple(part.name for part in module.shape.parts)
            name = f"{module.prefix}.{'+'.join(parts)}".removeprefix(".")
            scheme = module.method.scheme
            size = sum(tensor.nbytes for tensor in module.weights.values())
            size += 0 if module.bias is None else module.bias.nbytes
            stored = str(scheme) if scheme else str(module.weights["weight"].dtype).removeprefix("torch.")
            layers.append(Layer(name=name, parts=parts, method=type(module.method).__name__, scheme=stored,
                                bytes=size))
    return layers


def bytes_by_role(model: CausalLM) -> dict[str, int]:
    """Bytes the model keeps, by the part of the model they serve: embed, attn, mlp, norms, head, and in layers of
    experts router, experts, shared."""
    roles: dict[int, tuple[str, int]] = {}
    blocks = {path for path, module in model.named_modules() if isinstance(module, MoEBlock)}
    for path, module in model.named_modules():
        for tensor in own_tensors(module):  # a tied head is the embedding's tensor, and counts there
            roles.setdefault(id(tensor), (role_of(path, blocks), tensor.nbytes))
    total: Counter[str] = Counter()
    for role, size in roles.values():
        total[role] += size
    return dict(total)


def role_of(path: str, blocks: Container[str]) -> str:
    """The part of the model that the module at `path` serves; `blocks` are the paths of layers of experts."""
    names = path.split(".")
    depth = (3 if ".".join(names[:3]) in blocks else 2) if names[0] == "layers" else 0
    role = names[min(depth, len(names) - 1)]
    return "norm" if role.endswith("norm") else role


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    if isinstance(module, Linear):
        return [*module.weights.values(), *([] if module.bias is None else [module.bias])]
    own = (getattr(module, name, None) for name in ("weight", "bias"))
    return [tensor for tensor in own if isinstance(tensor, torch.Tensor)]


@dataclass(frozen=True, kw_only=True)
class OddScale:
    """A tensor of scales some of which deserve a look; `wrong` when they cannot be meant at all."""

    file: str
    tensor: str
    wrong: bool
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor}: {self.what}"


def odd_scales(checkpoint: Checkpoint) -> Iterator[OddScale]:
    """Scales that are zero, NaN or infinite, or denormal in the dtype they are stored in."""
    paths = {file.name: file.path for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        dtype = TORCH_DTYPES.get(info.dtype)
        if "scale" not in name.rpartition(".")[2] or dtype is None or not dtype.is_floating_point or not info.nbytes:
            continue
        with paths[info.file].open("rb") as file:
            file.seek(info.offset)
            values = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=dtype).float()
        odd = {
            "zero": values == 0, "NaN": values.isnan(), "infinite": values.isinf(),
            "denormal": (values != 0) & (values.abs() < torch.finfo(dtype).tiny),
        }
        counts = {what: int(mask.sum()) for what, mask in odd.items() if mask.any()}
        if counts:
            what = ", ".join(f"{count} {what}" for what, count in counts.items())
            yield OddScale(file=info.file, tensor=name, wrong=counts.keys() != {"denormal"},
                           what=f"{what} of {values.numel()} scales")
