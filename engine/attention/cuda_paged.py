"""Attention by the CUDA kernels: decoding by `paged_attention_v1` and `paged_attention_v2`, prompts by plain torch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...csrc.attention.cuda_paged import (
    Workspace,
    paged_attention_missing,
    paged_attention_v1,
    paged_attention_v2,
    partition_tokens,
    reshape_and_cache,
)
from ...models import Attention, AttentionRun, MLAAttention
from .base import AttentionProblem, StepShape
from .torch_paged import TorchPagedBackend, TorchPagedRun


class PagedAttention(TorchPagedBackend):
    """The torch backend with its decoding replaced: one launch, or two, for all requests that compute one token."""

    name: ClassVar[str] = "cuda_paged"
    priority: ClassVar[int] = 1
    capturable: ClassVar[bool] = True

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        if problem.kv_lora_rank is not None:
            return "has no kernel for latent attention"
        return paged_attention_missing(device=problem.device, dtype=problem.dtype,
                                       cache_dtype=problem.cache_dtype or problem.dtype, head_dim=problem.head_dim,
                                       block_size=problem.block_size)

    def prepare(self, step: StepShape) -> AttentionRun:
        return PagedAttentionRun(self, step)


class PagedAttentionRun(AttentionRun):
    """One step: its decoding requests for the kernels, and the others as a step of their own for torch.

    A step that only decodes is prepared without a look at the host's lengths, and may be captured.
    """

    def __init__(self, backend: PagedAttention, step: StepShape) -> None:
        self.backend = backend
        self.workspace: Workspace | None = None
        self.decode: StepShape | None = step
        self.rest: TorchPagedRun | None = None
        self.max_seq_len = step.block_table.shape[1] * backend.block_size  # no sequence has more blocks
        if step.max_query_len > 1:
            decoding = step.query_lens == 1
            self.decode = _part(step, decoding) if decoding.any() else None
            self.rest = TorchPagedRun(backend, _part(step, ~decoding))
            self.max_seq_len = int(step.seq_lens.max(initial=0, where=decoding))
            tokens = np.repeat(decoding, step.query_lens)
            self.tokens, self.rest_tokens = (torch.from_numpy(np.flatnonzero(these)).to(backend.device)
                                             for these in (tokens, ~tokens))

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rest is None:
            return self._decode(layer, q, k, v)
        if self.decode is None:
            return self.rest.run(layer, q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[self.tokens] = self._decode(layer, *(x[self.tokens] for x in (q, k, v)))
        out[self.rest_tokens] = self.rest.run(layer, *(x[self.rest_tokens] for x in (q, k, v)))
        return out

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("latent layers are refused by `supports`")

    def _decode(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.decode is not None
        cache, step = self.backend.caches[layer.index], self.decode
        scaled = cache.dtype == torch.float8_e4m3fn
        k_scale, v_scale = (layer.k_scale, layer.v_scale) if scaled else (1.0, 1.0)
        reshape_and_cache(k, v, cache, step.slots, k_scale=k_scale, v_scale=v_scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        context = cache, step.block_table, step.device_seq_lens
        tokens = partition_tokens(len(q), layer.num_heads, layer.num_kv_heads, self.max_seq_len, q.device)
        if tokens is None:
            paged_attention_v1(out, q, *context, scale=layer.scale, window=layer.sliding_window, k_scale=k_scale,
                               v_scale=v_scale)
        else:
            paged_attention_v2(out, self._workspace(q, tokens), q, *context, scale=layer.scale,
                               window=layer.sliding_window, k_scale=k_scale, v_scale=v_scale)
        return out

    def _workspace(self, q: Tensor, tokens: int) -> Workspace:
        """One for all layers of a shape: they run one after another."""
        found = self.workspace
        if found is None or found.tokens != tokens or found.partial.shape[1::2] != q.shape[1:]:
            found = self.workspace = Workspace.of(len(q), q.shape[1], q.shape[2], self.max_seq_len, q.device, tokens)
        return found


def _part(step: StepShape, chosen: np.ndarray) -> StepShape:
    """The requests of a step where `chosen` [R] is set, as a step."""
    device = step.block_table.device
    requests = torch.from_numpy(np.flatnonzero(chosen)).to(device)
    tokens = torch.from_numpy(np.flatnonzero(np.repeat(chosen, step.query_lens))).to(device)
    query_lens = step.query_lens[chosen]
    starts = np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
    return StepShape(query_lens=query_lens, seq_lens=step.seq_lens[chosen], block_table=step.block_table[requests],
                     host_block_table=step.host_block_table[chosen], slots=step.slots[tokens],
                     query_start=torch.from_numpy(starts).to(device), device_seq_lens=step.device_seq_lens[requests],
                     max_query_len=int(query_lens.max()))
