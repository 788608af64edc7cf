"""What a model is to the engine: a batch in, hidden states out, weights as slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from ..moe import Experts
from ..plugins.log import get_logger
from ..quant import Linear, Slot

if TYPE_CHECKING:
    from .attention import Attention

log = get_logger(__name__)


class AttentionRun(Protocol):
    """One step's attention, prepared by a backend."""

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads, D]; writes k and v to the layer's cache first."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input: ids [T] and positions [T] (int64), requests one after another, and their attention."""

    ids: Tensor
    positions: Tensor
    attn: AttentionRun


@runtime_checkable
class HasSlots(Protocol):
    """A module with checkpoint tensors of its own."""

    def slots(self) -> Iterator[Slot]: ...


class CausalLM(nn.Module):
    """Base of every architecture.

    A subclass builds its layers, implements `forward`, and gives `head` for the logits. `ignored_tensors` maps a
    regular expression over checkpoint names to the reason why such a tensor is of no use.
    """

    ignored_tensors: Mapping[str, str] = MappingProxyType({})
    head: nn.Module

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Final hidden states [T, hidden], normalised."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> logits [S, vocab]."""
        return self.head(hidden)

    def slots(self) -> Iterator[Slot]:
        """Every checkpoint tensor the model uses, in module order."""
        for module in self.modules():
            if module is not self and isinstance(module, HasSlots):
                yield from module.slots()

    def after_load(self) -> None:
        """Let each layer check and repack what it was filled with; called once, when every slot is filled.

        Raises CheckpointError that names the layer whose values cannot be meant.
        """
        for module in self.modules():
            if isinstance(module, Experts | Linear):
                module.after_load()
        scaled = [layer for layer in self.attention_layers() if layer.after_load()]
        if scaled:
            log.info("%d layer(s) store scales of an FP8 KV cache: kept for one, this release's cache is not quantized",
                     len(scaled))

    def attention_layers(self) -> list[Attention]:
        """The attention layers by index."""
        from .attention import Attention

        layers = [m for m in self.modules() if isinstance(m, Attention)]
        return sorted(layers, key=lambda layer: layer.index)
