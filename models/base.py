"""What a model is to the engine: a batch in, hidden states out, weights as slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from ..csrc.attention import HeadNorms
from ..moe import Experts
from ..plugins.log import get_logger
from ..quant import KVScales, Linear, Slot

if TYPE_CHECKING:
    from .attention import Attention
    from .mla import MLAAttention

log = get_logger(__name__)


class AttentionRun(Protocol):
    """One step's attention, prepared by a backend."""

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads, D]; writes k and v to the layer's cache first."""
        ...

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        """q_nope [T, heads, N], q_pe [T, heads, R], rows [T, C + R] -> [T, heads, V]; writes the rows first."""
        ...


class FusedAttentionRun(AttentionRun):
    """A run that takes what the projections give, so that what lies between them and attention is its own launch."""

    @abstractmethod
    def run_qkv(self, layer: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor],
                norms: HeadNorms | None = None) -> Tensor:
        """`run` of qkv [T, (heads + 2 kv_heads) D] once split, normed by head and rotated -> [T, heads, D]."""

    @abstractmethod
    def run_q_latent(self, layer: MLAAttention, q: Tensor, latent: Tensor, k_pe: Tensor, rope: tuple[Tensor, Tensor],
                     weight: Tensor, eps: float) -> Tensor:
        """`run_latent` of q [T, heads (N + R)], latent [T, C] before its RMSNorm (weight [C], eps) and before it is
        rounded as the layer's `latent_rounding` says, and k_pe [T, R], none rotated -> [T, heads, V]."""


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


@runtime_checkable
class Connects(Protocol):
    """A module whose parts hand each other rounded values where the kernels, by then chosen, take them."""

    def connect(self) -> None: ...


class AttentionLayer(nn.Module):
    """What the cache and a backend know of any attention layer.

    Attributes:
        index: which layer's cache.
        num_heads, head_dim: of the queries as they meet the keys; `scale` multiplies their products.
        kv_shape: (planes, heads, width), the values kept per token: (2, kv_heads, head_dim) for K and V.
        kv_lora_rank: width of the latent that K and V are made of (multi-head latent attention, `run_latent`), at the
            front of the one plane; None when K and V themselves are kept (`run`).
        sliding_window: a query sees that many positions, itself included; None sees all.
        k_scale, v_scale: for an FP8 cache, 1.0 where the checkpoint stores none (a cached value times its scale is
            the value).

    Args:
        prefix: the layer's name in the checkpoint ("model.layers.0.self_attn"), where those scales are looked for.
    """

    kv_lora_rank: int | None = None
    sliding_window: int | None = None

    def __init__(self, index: int, *, num_heads: int, head_dim: int, kv_shape: tuple[int, int, int],
                 scale: float | None, prefix: str | None) -> None:
        super().__init__()
        self.index, self.num_heads, self.head_dim, self.kv_shape = index, num_heads, head_dim, kv_shape
        self.scale = head_dim**-0.5 if scale is None else scale
        self.k_scale = self.v_scale = 1.0
        self._stored_scales = None if prefix is None else KVScales(prefix)

    @property
    def num_kv_heads(self) -> int:
        return self.kv_shape[1]

    def slots(self) -> Iterator[Slot]:
        if self._stored_scales is not None:
            yield from self._stored_scales.slots()

    def after_load(self) -> bool:
        """Take over the cache's scales; whether there are any. Raises CheckpointError for ones that cannot be meant."""
        scales = None if self._stored_scales is None else self._stored_scales.read()
        if scales is not None:
            self.k_scale, self.v_scale = scales
        return scales is not None


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

    @contextmanager
    def one_layer_of_a_kind(self) -> Iterator[None]:
        """While this lasts, layers that launch what another launches may be left out, for the launches' sake: what
        comes out means nothing. Here none is."""
        yield

    def slots(self) -> Iterator[Slot]:
        """Every checkpoint tensor the model uses, in module order."""
        for module in self.modules():
            if module is not self and isinstance(module, HasSlots):
                yield from module.slots()

    def after_load(self) -> None:
        """Let each layer check and repack what it was filled with; called once, when every slot is filled.

        Raises CheckpointError that names the layer whose values cannot be meant.
        """
        scaled = [layer for layer in self.attention_layers() if layer.after_load()]
        for module in self.modules():
            if isinstance(module, Experts | Linear):
                module.after_load()
        for module in self.modules():
            if isinstance(module, Connects):
                module.connect()
        if scaled:
            log.info("%d layer(s) store scales of an FP8 KV cache: used with --kv-cache-dtype fp8",
                     len(scaled))

    def attention_layers(self) -> list[AttentionLayer]:
        """The attention layers by index."""
        layers = [m for m in self.modules() if isinstance(m, AttentionLayer)]
        return sorted(layers, key=lambda layer: layer.index)
