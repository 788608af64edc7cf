"""A checkpoint read one piece at a time: its embedding, one decoder layer, its head; each is built and filled alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...engine.args import EngineArgs
from ...engine.config import EngineConfig
from ...engine.loader import check_quantized, quantization, stored_modules
from ...engine.loader.ledger import Ledger
from ...engine.loader.safetensors_loader import fill
from ...engine.loader.scan import scan
from ...engine.text.tokenizer import Tokenizer
from ...models import CausalLM, Fields, Make
from ...models.decoder import DecoderLM
from ...models.mla import MLAAttention
from ...models.rope import RopeConfig, Rotary
from ...moe import Backends
from ...moe.reference import ReferenceBackend
from ...plugins.errors import UsageError
from ...plugins.manager import PluginHost
from ...quant import Linear

META = torch.device("meta")
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)")
ELSEWHERE = {".*": "belongs to another piece of the model"}


@dataclass(frozen=True, kw_only=True)
class PieceMake(Make):
    """A factory that gives memory to decoder layer `layer` alone, or with None to what lies outside of all layers.

    Everything else is made on torch's meta device: shapes without memory. `place` is where memory is.
    """

    place: torch.device
    layer: int | None

    def at(self, name: str) -> Make:
        made = super().at(name)
        match = LAYER.fullmatch(made.prefix)
        if match is None:
            return made
        return replace(made, device=self.place if int(match[1]) == self.layer else META)

    def rotary(self, config: RopeConfig, head_dim: int) -> Rotary:
        return Rotary(config, head_dim, self.max_len, dtype=self.dtype, device=self.place)


class Matrix(NamedTuple):
    """A checkpoint matrix: its name, how it is stored, its [out, in]."""

    name: str
    stored: str
    shape: tuple[int, int]


def arithmetic(args: EngineArgs) -> torch.dtype:
    """What layers are compared in: float32 on any device, unless a dtype was asked for."""
    return torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)


class Source:
    """One checkpoint, checked as a whole by its headers, its weights read by the piece.

    Args:
        config: of the checkpoint.
        dtype: of activations and of weights that are not quantized.

    Every linear layer runs by its method's own arithmetic: what the format means, whichever kernels there are.

    Raises:
        CheckpointError: for all that loading would refuse of names, shapes and types.
        UsageError: weights that are made up, or a model that is not a stack of decoder layers.
    """

    def __init__(self, config: EngineConfig, host: PluginHost, *, dtype: torch.dtype = torch.float32) -> None:
        if config.load.load_format not in ("auto", "safetensors"):
            raise UsageError("only weights in safetensors files can be compared layer by layer",
                             found=f"--load-format {config.load.load_format}")
        self.config, self.dtype = config, dtype
        self.device = torch.device(config.device.device)
        self.tokenizer = None if config.model.tokenizer is None else Tokenizer.from_folder(
            Path(config.model.tokenizer), chat_template=config.model.chat_template)
        self.checkpoint = scan(Path(config.model.model))
        self._stored = stored_modules(self.checkpoint)
        self._quant = quantization(config, host)
        self._model_class = host.resolve("model", config.model.architecture)
        whole = self._build(None, META)
        if self._quant is not None:
            check_quantized(whole, config)
        ignored = {**whole.ignored_tensors, **(self._quant.ignored_tensors if self._quant else {})}
        Ledger(whole.slots(), ignored).match(self.checkpoint)
        self.layers = len(whole.layers)
        self.matrices = tuple(_declared(whole))

    def _build(self, layer: int | None, place: torch.device, max_len: int = 1) -> DecoderLM:
        """The model with memory for one piece alone, made anew for every piece: none can outlive its use."""
        make = PieceMake(dtype=self.dtype, device=META if layer is not None else place, max_len=max_len,
                         quant=self._quant, stored=self._stored, place=place, layer=layer,
                         backends=Backends(known={ReferenceBackend.name: ReferenceBackend}))
        config = self.config.model
        model: CausalLM = self._model_class(Fields(config.hf_config, config.architecture), make)
        if not isinstance(model, DecoderLM):
            raise UsageError("only models that are a stack of decoder layers can be compared layer by layer",
                             found=config.architecture)
        return model

    def _filled(self, model: DecoderLM, *keep: str) -> DecoderLM:
        """`model` with nothing but its children `keep`, and these as the engine would have them."""
        for name, _ in list(model.named_children()):
            if name not in keep:
                setattr(model, name, nn.Identity())
        model.ignored_tensors = ELSEWHERE
        fill(model, self.checkpoint, progress=False)
        model.after_load()
        return model.eval()

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> rows [T, hidden]; the table is dropped again."""
        return self._filled(self._build(None, self.device), "embed").embed(ids)

    def layer(self, index: int, max_len: int) -> DecoderLM:
        """The model with decoder layer `index` alone, as `layers[0]`, for sequences of up to `max_len` tokens.

        It lives as long as the caller keeps it.
        """
        model = self._build(index, self.device, max_len)
        model.layers = nn.ModuleList([model.layers[index]])
        return self._filled(model, "layers")

    def head(self) -> DecoderLM:
        """The model without its layers: norm, and what `compute_logits` needs."""
        model = self._build(None, self.device)
        tied = getattr(model.head, "weight", None) is model.embed.weight
        return self._filled(model, "norm", "head", *(["embed"] if tied else []))


def _declared(model: nn.Module) -> Iterator[Matrix]:
    for linear in model.modules():
        if isinstance(linear, Linear):
            for part in linear.shape.parts:
                yield Matrix(_name(linear, part.name), _stored_as(linear), (part.size, linear.shape.in_features))


def dequantized(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name, how it is stored, the float matrix that it stands for) of every checkpoint matrix in a loaded piece."""
    absorbed = {m.kv_b: m.w_kv.flatten(0, 1) for m in module.modules() if isinstance(m, MLAAttention)}
    for linear in module.modules():
        if isinstance(linear, Linear):
            whole = absorbed[linear] if linear in absorbed else linear.method.dequant(linear.weights)
            for part, rows in zip(linear.shape.parts, whole.split([part.size for part in linear.shape.parts])):
                yield _name(linear, part.name), _stored_as(linear), rows


def _stored_as(linear: Linear) -> str:
    return "unquantized" if linear.method.plain else linear.scheme


def _name(linear: Linear, part: str) -> str:
    return f"{linear.prefix}.{part}" if linear.prefix else part
