"""A decoder layer over whole sequences: plain causal attention without a cache, some sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...csrc.attention import attend, attend_expanded, causal_mask
from ...models import Attention, Batch, MLAAttention
from ...models.decoder import DecoderLayer, DecoderLM
from ...moe import MoEBlock

BATCH_TOKENS = 2048  # bounds what one layer's activations take
EXPANDED_TOKENS = 1024  # keys and values made of latents at a time


@dataclass(frozen=True)
class CausalRun:
    """The AttentionRun of sequences of `lengths`, one after another, each from its first token on."""

    lengths: Sequence[int]
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(t.split(list(self.lengths)) for t in (q, k, v)))
        out = []
        for queries, keys, values in sequences:
            mask = self._mask(layer.sliding_window, queries)
            out.append(attend(queries, keys, values, scale=layer.scale, mask=mask,
                              causal=mask is None and len(queries) > 1))
        return torch.cat(out)

    def _mask(self, window: int | None, queries: Tensor) -> Tensor | None:
        """None where plain causal order is all there is."""
        length = len(queries)
        if window is None or length <= window:
            return None
        if (length, window) not in self._masks:
            self._masks[length, window] = causal_mask(length, length, window, dtype=queries.dtype,
                                                      device=queries.device)
        return self._masks[length, window]

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        queries = torch.cat((q_nope, q_pe), dim=-1)
        return torch.cat([
            attend_expanded(mine, partial(_rows, latents), len(latents), layer.w_kv, value=layer.v_head_dim,
                            scale=layer.scale, chunk=EXPANDED_TOKENS)
            for mine, latents in zip(queries.split(list(self.lengths)), rows.split(list(self.lengths)))
        ])


def _rows(rows: Tensor, start: int, stop: int) -> Tensor:
    return rows[start:stop]


class Part(NamedTuple):
    """Whole sequences that are run together: their rows among all tokens, and their lengths."""

    rows: slice
    lengths: list[int]


def parts(lengths: Sequence[int]) -> Iterator[Part]:
    """Sequences in order, as many at a time as fit BATCH_TOKENS, but at least one."""
    start, held = 0, list[int]()
    for length in lengths:
        if held and sum(held) + length > BATCH_TOKENS:
            yield Part(slice(start, start + sum(held)), held)
            start, held = start + sum(held), []
        held = [*held, length]
    if held:
        yield Part(slice(start, start + sum(held)), held)


class Ran(NamedTuple):
    """What a layer gave: hidden states [T, hidden]; before its second norm; and the input of its experts, if any."""

    hidden: Tensor
    middle: Tensor
    block_input: Tensor | None


def run_layer(model: DecoderLM, ids: Tensor, hidden: Tensor, lengths: Sequence[int]) -> Ran:
    """hidden [T, hidden] before `layers[0]` of `model` -> after it, both with the residual stream added."""
    positions = torch.cat([torch.arange(length, device=hidden.device) for length in lengths])
    batch = Batch(ids=ids, positions=positions, attn=CausalRun(lengths))
    layer, seen = model.layers[0], list[Tensor]()
    block = block_of(model)
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if block else None
    try:
        x, residual = layer(hidden, None, model.rotary(positions), batch)
    finally:
        if hook is not None:
            hook.remove()
    return Ran(x + residual, residual, seen[0] if seen else None)


def block_input(model: DecoderLM, middle: Tensor) -> Tensor:
    """What `layers[0]` would give its experts: hidden states [T, hidden] after its attention through its own norm."""
    layer = model.layers[0]
    assert isinstance(layer, DecoderLayer)
    return layer.post_norm(middle)[0]


def block_of(model: DecoderLM) -> MoEBlock | None:
    """The experts of a model of one layer."""
    return next((module for module in model.layers.modules() if isinstance(module, MoEBlock)), None)
