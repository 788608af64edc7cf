"""The pre-norm decoder that Llama and its relatives share: attention, feed-forward, residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from ..csrc.quantize import Quantized, Rounding
from ..quant import shared_rounding
from .attention import Attention
from .base import Batch, CausalLM
from .layers import Embedding, RMSNorm, TiedHead
from .make import Make
from .rope import RopeConfig, Rotary


class SelfAttention(nn.Module):
    """Fused q, k, v projection, attention, output projection."""

    def __init__(self, qkv: nn.Module, attn: Attention, out: nn.Module) -> None:
        super().__init__()
        self.qkv, self.attn, self.out = qkv, attn, out

    @property
    def rounding(self) -> Rounding | None:
        return shared_rounding([self.qkv])

    def forward(self, x: Tensor | Quantized, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return self.out(self.attn(self.qkv(x), rope, batch))


class DecoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); the sums are carried as `residual` and added by the next norm."""

    def __init__(self, input_norm: RMSNorm, attn: nn.Module, post_norm: RMSNorm, mlp: nn.Module) -> None:
        super().__init__()
        self.input_norm, self.attn, self.post_norm, self.mlp = input_norm, attn, post_norm, mlp

    def connect(self) -> None:
        self.input_norm.feed(self.attn)
        self.post_norm.feed(self.mlp)

    def forward(self, x: Tensor, residual: Tensor | None, rope: tuple[Tensor, Tensor],
                batch: Batch) -> tuple[Tensor, Tensor]:
        x, residual = self.input_norm(x, residual)
        x, residual = self.post_norm(self.attn(x, rope, batch), residual)
        return self.mlp(x), residual


class DecoderConfig(Protocol):
    """What every decoder's config says under the same name."""

    vocab: int
    hidden: int
    layers: int
    eps: float
    tied: bool
    rope: RopeConfig


class DecoderLM(CausalLM):
    """Embedding, layers, final norm and head; a model file builds the parts."""

    def __init__(self, *, embed: Embedding, rotary: Rotary, layers: Iterable[DecoderLayer], norm: RMSNorm,
                 head: nn.Module) -> None:
        super().__init__()
        self.embed, self.rotary, self.norm, self.head = embed, rotary, norm, head
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: Batch) -> Tensor:
        x, residual = self.embed(batch.ids), None
        rope = self.rotary(batch.positions)
        for layer in self.layers:
            x, residual = layer(x, residual, rope, batch)
        return self.norm(x, residual)[0]

    @contextmanager
    def one_layer_of_a_kind(self) -> Iterator[None]:
        """The first layer, which has no residual stream yet, and of the others one of those that print alike."""
        whole, kinds = self.layers, dict[str, nn.Module]()
        for layer in whole[1:]:
            kinds.setdefault(repr(layer), layer)
        self.layers = nn.ModuleList([*whole[:1], *kinds.values()])
        try:
            yield
        finally:
            self.layers = whole


class HubDecoderLM(DecoderLM):
    """A DecoderLM under the names that the hub's decoders share: model.embed_tokens, model.layers, model.norm, lm_head.

    Args:
        rotated: the width of a head that is rotated.
        layer: makes layer i, given the factory at its place.
    """

    def __init__(self, c: DecoderConfig, make: Make, rotated: int, layer: Callable[[int, Make], DecoderLayer]) -> None:
        body = make.at("model")
        embed = body.embedding("embed_tokens", c.vocab, c.hidden)
        super().__init__(
            embed=embed,
            rotary=make.rotary(c.rope, rotated),
            layers=[layer(i, body.at(f"layers.{i}")) for i in range(c.layers)],
            norm=body.norm("norm", c.hidden, c.eps),
            head=TiedHead("lm_head", embed) if c.tied else make.linear("lm_head", c.hidden, c.vocab),
        )
