"""The plain torch backend: the reference everywhere and the default on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

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
        return TorchPagedRun(self, step)


class Span(NamedTuple):
    """One request as a layer sees it: its blocks in the cache (None: all its tokens are in the batch) and its mask."""

    rows: slice
    blocks: Tensor | None
    length: int
    mask: Tensor | None
    causal: bool


class TorchPagedRun(AttentionRun):
    """One step over the backend's caches; spans and masks are made once for the layers that agree on a window."""

    def __init__(self, backend: TorchPagedBackend, step: StepShape) -> None:
        self.backend, self.step = backend, step
        self.query_lens: list[int] = step.query_lens.tolist()
        self._spans: dict[int | None, list[Span]] = {}
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, out = self.backend.caches[layer.index], []
        write_kv(cache, k, v, self.step.slots)
        for query, span in zip(q.split(self.query_lens), self._spans_within(layer.sliding_window)):
            if span.blocks is None:
                keys, values = k[span.rows], v[span.rows]
            else:
                keys, values = gather_kv(cache, span.blocks, span.length)
            out.append(attend(query, keys, values, scale=layer.scale, mask=span.mask, causal=span.causal))
        return torch.cat(out)

    def _spans_within(self, window: int | None) -> list[Span]:
        if window not in self._spans:
            lengths, ends = self.step.seq_lens.tolist(), self.step.query_lens.cumsum().tolist()
            self._spans[window] = [
                self._span(query, length, end, table, window)
                for query, length, end, table in zip(self.query_lens, lengths, ends, self.step.block_table.unbind())
            ]
        return self._spans[window]

    def _span(self, query: int, length: int, end: int, table: Tensor, window: int | None) -> Span:
        rows, size, whole = slice(end - query, end), self.backend.block_size, query == length
        blocks = None
        if not whole:
            unseen = 0 if window is None else max(0, length - query - window + 1) // size  # by any query
            blocks = table[unseen : -(-length // size)]
            length -= unseen * size
        mask = self._mask(query, length, window)
        return Span(rows, blocks, length, mask, whole and mask is None and query > 1)

    def _mask(self, query: int, length: int, window: int | None) -> Tensor | None:
        """None when plain causal order needs no mask: one query, or a whole prompt inside the window."""
        if (window is None or length <= window) and query in (1, length):
            return None
        key = (query, length, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(query, length, window, dtype=self.backend.dtype,
                                           device=self.backend.device)
        return self._masks[key]
