"""The CPU backend: compiled kernels that read the paged cache where it lies, for prompts, chunks and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...csrc.attention import HeadNorms, Ragged
from ...csrc.attention.cpu_paged import (
    attend_paged_cpu,
    cpu_attention_missing,
    rope_and_cache_cpu,
    store_kv_cpu,
)
from ...models import Attention, AttentionLayer, FusedAttentionRun, MLAAttention
from ..plan import KVCacheLayout
from .base import AttentionBackend, AttentionProblem, StepShape


class CpuAttentionBackend(AttentionBackend):
    """nybble's own default on CPU. To be asked may compile the kernels: a backend is chosen while a model is loaded."""

    name: ClassVar[str] = "cpu"
    priority: ClassVar[int] = 1

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        if problem.kv_lora_rank is not None:
            return "has no kernel for latent attention"
        return cpu_attention_missing(device=problem.device, dtype=problem.dtype, cache_dtype=problem.cache_dtype,
                                     head_dim=problem.head_dim, group=problem.num_heads // problem.num_kv_heads)

    def __init__(self, layers: Sequence[AttentionLayer], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device, cache_dtype: torch.dtype | None = None) -> None:
        self.caches = self.allocate(layers, layout, cache_dtype or dtype, device)

    def prepare(self, step: StepShape) -> CpuAttentionRun:
        return CpuAttentionRun(self, step)


class CpuAttentionRun(FusedAttentionRun):
    """One step over the backend's caches."""

    def __init__(self, backend: CpuAttentionBackend, step: StepShape) -> None:
        self.backend, self.slots = backend, step.slots
        self.batch = Ragged(query_start=step.query_start, seq_lens=step.device_seq_lens, block_table=step.block_table,
                            max_query_len=step.max_query_len)

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store_kv_cpu(self.backend.caches[layer.index], k, v, self.slots)
        return self._attend(layer, q)

    def run_qkv(self, layer: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor],
                norms: HeadNorms | None = None) -> Tensor:
        """As `run` of qkv [T, (heads + 2 kv_heads) D] split, normed and rotated, in two passes."""
        cache = self.backend.caches[layer.index]
        return self._attend(layer, rope_and_cache_cpu(qkv, *rope, cache, self.slots, heads=layer.num_heads,
                                                      norms=norms))

    def _attend(self, layer: Attention, q: Tensor) -> Tensor:
        return attend_paged_cpu(q, self.backend.caches[layer.index], self.batch, scale=layer.scale,
                                window=layer.sliding_window)

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("latent layers are refused by `supports`")

    def run_q_latent(self, layer: MLAAttention, q: Tensor, latent: Tensor, k_pe: Tensor, rope: tuple[Tensor, Tensor],
                     weight: Tensor, eps: float) -> Tensor:
        raise AssertionError("latent layers are refused by `supports`")
