"""The plain torch backend: the reference everywhere and the default on CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...csrc.attention import (
    absorb,
    absorbing_is_cheaper,
    attend,
    attend_expanded,
    attend_rows,
    causal_mask,
    gather_kv,
    gather_rows,
    project_values,
    write_kv,
    write_rows,
)
from ...models import Attention, AttentionLayer, AttentionRun, MLAAttention
from ..plan import KVCacheLayout
from .base import AttentionBackend, AttentionProblem, StepShape

# Tokens whose keys and values are made of their latents at a time, and then forgotten: bounds a long prefix's memory.
EXPANDED_TOKENS = 1024


class TorchPagedBackend(AttentionBackend):
    """Gathers each request's blocks and calls torch's attention on them."""

    name: ClassVar[str] = "torch"

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        return None

    def __init__(self, layers: Sequence[AttentionLayer], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device, cache_dtype: torch.dtype | None = None) -> None:
        self.block_size, self.dtype, self.device = layout.block_size, dtype, device
        self.exact = cache_dtype in (None, dtype)  # what is read back is what was written
        self.caches = self.allocate(layers, layout, cache_dtype or dtype, device)

    def prepare(self, step: StepShape) -> AttentionRun:
        return TorchPagedRun(self, step)


class Span(NamedTuple):
    """One request as a layer sees it: its blocks in the cache (None: all its tokens are in the batch) and its mask."""

    rows: slice
    blocks: Tensor | None
    length: int
    mask: Tensor | None
    causal: bool


class LatentSpan(NamedTuple):
    """One request as a latent layer sees it: its rows in the batch, its blocks in the cache, its length."""

    rows: slice
    blocks: Tensor
    length: int

    @property
    def query(self) -> int:
        return self.rows.stop - self.rows.start


class LatentSpans(NamedTuple):
    """Requests by the way that is cheaper for them; `absorbed_rows` are all batch rows of the first kind."""

    absorbed: list[LatentSpan]
    absorbed_rows: Tensor | slice
    expanded: list[LatentSpan]


class TorchPagedRun(AttentionRun):
    """One step over the backend's caches; spans and masks are made once for the layers that agree on a window."""

    def __init__(self, backend: TorchPagedBackend, step: StepShape) -> None:
        self.backend, self.step = backend, step
        self.query_lens: list[int] = step.query_lens.tolist()
        self._spans: dict[int | None, list[Span]] = {}
        self._latent_spans: dict[tuple[int, int, int], LatentSpans] = {}
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, out = self.backend.caches[layer.index], []
        scales = dict(k_scale=layer.k_scale, v_scale=layer.v_scale)
        write_kv(cache, k, v, self.step.slots, **scales)
        for query, span in zip(q.split(self.query_lens), self._spans_within(layer.sliding_window)):
            if span.blocks is None:
                keys, values = k[span.rows], v[span.rows]
            else:
                keys, values = gather_kv(cache, span.blocks, span.length, q.dtype, **scales)
            out.append(attend(query, keys, values, scale=layer.scale, mask=span.mask, causal=span.causal))
        return torch.cat(out)

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        cache, spans = self.backend.caches[layer.index], self._spans_of_latents(layer)
        write_rows(cache, rows, self.step.slots, scale=layer.k_scale)
        out = rows.new_empty(len(rows), layer.num_heads, layer.v_head_dim)
        if spans.absorbed:
            these = spans.absorbed_rows
            queries = torch.cat((absorb(q_nope[these], layer.w_uk), q_pe[these]), dim=-1)
            context = [
                attend_rows(q, self._rows_of(layer, span)(0, span.length), layer.kv_lora_rank, scale=layer.scale)
                for q, span in zip(queries.split([span.query for span in spans.absorbed]), spans.absorbed)
            ]
            out[these] = project_values(torch.cat(context), layer.w_uv)
        size = self.backend.block_size
        chunk = max(1, EXPANDED_TOKENS // size) * size
        for span in spans.expanded:
            q = torch.cat((q_nope[span.rows], q_pe[span.rows]), dim=-1)
            out[span.rows] = attend_expanded(q, self._rows_of(layer, span), span.length, layer.w_kv,
                                             value=layer.v_head_dim, scale=layer.scale, chunk=chunk)
        return out

    def _rows_of(self, layer: MLAAttention, span: LatentSpan) -> Callable[[int, int], Tensor]:
        size, cache = self.backend.block_size, self.backend.caches[layer.index]
        # `start` is at a block's first token
        return lambda start, stop: gather_rows(cache, span.blocks[start // size : -(-stop // size)], stop - start,
                                               self.backend.dtype, scale=layer.k_scale)

    def _spans_of_latents(self, layer: MLAAttention) -> LatentSpans:
        key = (layer.kv_lora_rank, layer.qk_nope_head_dim, layer.v_head_dim)
        if key not in self._latent_spans:
            absorbed: list[LatentSpan] = []
            expanded: list[LatentSpan] = []
            lengths, end = self.step.seq_lens.tolist(), 0
            for query, length, table in zip(self.query_lens, lengths, self.step.block_table.unbind()):
                end += query
                span = LatentSpan(slice(end - query, end), table[: -(-length // self.backend.block_size)], length)
                cheaper = absorbing_is_cheaper(query, length, latent=key[0], nope=key[1], value=key[2])
                (absorbed if cheaper else expanded).append(span)
            rows: Tensor | slice = slice(None)
            if absorbed and expanded:
                rows = torch.cat([torch.arange(span.rows.start, span.rows.stop) for span in absorbed])
                rows = rows.to(self.backend.device)
            self._latent_spans[key] = LatentSpans(absorbed, rows, expanded)
        return self._latent_spans[key]

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
        if not (whole and self.backend.exact):
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
