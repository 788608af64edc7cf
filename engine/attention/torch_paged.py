"""The plain torch backend: the reference everywhere and the default on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...csrc.attention import attend, causal_mask, gather_kv, write_kv
from ...models import Attention, AttentionRun
from ..plan import KVCacheLayout
from .base import AttentionBackend, AttentionProblem, StepShape


class TorchPagedBackend(AttentionBackend):
    """Gathers each request's blocks and calls torch's attention on them."""

    name: ClassVar[str] = "torch"

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        return None

    def __init__(self, layers: Sequence[Attention], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.block_size, self.dtype, self.device = layout.block_size, dtype, device
        self.caches = [
            torch.empty(2, layout.num_blocks, layout.block_size, layer.num_kv_heads, layer.head_dim, dtype=dtype,
                        device=device)
            for layer in layers
        ]

    def prepare(self, step: StepShape) -> AttentionRun:
        spans, start = [], 0
        blocks = (step.seq_lens + self.block_size - 1) // self.block_size
        for i, (query, length, count) in enumerate(zip(step.query_lens.tolist(), step.seq_lens.tolist(),
                                                       blocks.tolist())):
            spans.append(Span(start=start, query=query, length=length, blocks=step.block_table[i, :count]))
            start += query
        return TorchPagedRun(self, spans, step.slots)


@dataclass(frozen=True, kw_only=True)
class Span:
    """One request of a step: its rows in the batch and its blocks in the cache."""

    start: int
    query: int
    length: int
    blocks: Tensor


class TorchPagedRun(AttentionRun):
    """One step over the backend's caches; masks are made once and shared by the layers that agree on a window."""

    def __init__(self, backend: TorchPagedBackend, spans: list[Span], slots: Tensor) -> None:
        self.backend, self.spans, self.slots = backend, spans, slots
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.backend.caches[layer.index]
        write_kv(cache, k, v, self.slots)
        out = torch.empty_like(q)
        for span in self.spans:
            rows = slice(span.start, span.start + span.query)
            whole, length = span.query == span.length, span.length
            if whole:
                keys, values = k[rows], v[rows]
            else:
                skip = self._blocks_out_of_sight(span, layer.sliding_window)
                length -= skip * self.backend.block_size
                keys, values = gather_kv(cache, span.blocks[skip:], length)
            mask = self._mask(span.query, length, layer.sliding_window)
            out[rows] = attend(q[rows], keys, values, scale=layer.scale, mask=mask,
                               causal=whole and mask is None and span.query > 1)
        return out

    def _blocks_out_of_sight(self, span: Span, window: int | None) -> int:
        """Leading blocks that no query of the span can see."""
        return 0 if window is None else max(0, span.length - span.query - window + 1) // self.backend.block_size

    def _mask(self, query: int, length: int, window: int | None) -> Tensor | None:
        """None when plain causal order needs no mask: one query, or a whole prompt inside the window."""
        if (window is None or length <= window) and query in (1, length):
            return None
        key = (query, length, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(query, length, window, dtype=self.backend.dtype,
                                           device=self.backend.device)
        return self._masks[key]
