"""The Triton backend: nybble's own default on CUDA, one ragged kernel for prompts, chunks and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...csrc.attention import (
    HeadNorms,
    Ragged,
    absorb,
    absorbing_is_cheaper,
    attend_expanded,
    attend_latent,
    attend_paged,
    attend_plain,
    gather_rows,
    latent_and_cache,
    project_values,
    prompt_attention_missing,
    rope_and_attend,
    rope_and_cache,
    store_kv,
)
from ...csrc.launch import lacks_fp8, missing
from ...models import Attention, AttentionLayer, FusedAttentionRun, MLAAttention
from ..plan import KVCacheLayout
from .base import AttentionBackend, AttentionProblem, StepShape

PROMPT_ATTENTION = "prompt_attention"
WIDEST_HEAD = 256
WIDEST_LATENT = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tokens whose keys and values are made of their latents at once, in a buffer that all layers share.
EXPANDED_TOKENS = 8192
# A longer request is taken this many tokens at a time.
EXPANDED_CHUNK = 1024


class TritonAttentionBackend(AttentionBackend):
    """Reads the cache where it lies. A step's geometry is read on the device: nothing here waits for it."""

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = 10
    capturable: ClassVar[bool] = True

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        if (reason := missing(problem.device, (8, 0))) is not None:
            return reason
        if problem.dtype not in DTYPES:
            return f"computes in 16 or 32 bits, not in {str(problem.dtype).removeprefix('torch.')}"
        if problem.cache_dtype == torch.float8_e4m3fn and lacks_fp8(problem.device):
            return "an FP8 cache needs compute capability 8.9"
        if problem.kv_lora_rank is None:
            return None if problem.head_dim <= WIDEST_HEAD else f"head_dim {problem.head_dim} > {WIDEST_HEAD}"
        if problem.sliding_window is not None:
            return "has no sliding window over latents"
        return None if problem.kv_lora_rank <= WIDEST_LATENT else f"latents of {problem.kv_lora_rank} > {WIDEST_LATENT}"

    @classmethod
    def explain(cls, problem: AttentionProblem) -> dict[str, str]:
        if problem.kv_lora_rank is not None:
            return {}
        reason = prompt_attention_missing(
            device=problem.device, dtype=problem.dtype, cache_dtype=problem.cache_dtype, head_dim=problem.head_dim,
            block_size=problem.block_size, group=problem.num_heads // problem.num_kv_heads,
            window=problem.sliding_window)
        return {"prompts": PROMPT_ATTENTION if reason is None else f"{cls.name}, as {PROMPT_ATTENTION} {reason}"}

    def __init__(self, layers: Sequence[AttentionLayer], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device, cache_dtype: torch.dtype | None = None) -> None:
        self.block_size, self.dtype, self.device = layout.block_size, dtype, device
        self.caches = self.allocate(layers, layout, cache_dtype or dtype, device)
        latent = [layer for layer in layers if isinstance(layer, MLAAttention)]
        width = max((a.num_heads * (a.qk_nope_head_dim + a.v_head_dim) for a in latent), default=0)
        self.expanded_tokens = min(EXPANDED_TOKENS, layout.num_blocks * layout.block_size)
        self.expanded = torch.empty(self.expanded_tokens * width, dtype=dtype, device=device)

    def prepare(self, step: StepShape) -> TritonAttentionRun:
        return TritonAttentionRun(self, step)


@dataclass(frozen=True, kw_only=True)
class LatentPart:
    """Requests of a step that are computed one way: their rows of the batch and of the step, as a batch of their own.

    `key_start` [R] is where each one's keys begin when they are put together; None when they stay in the cache.
    """

    rows: Tensor | slice
    requests: Sequence[int]
    batch: Ragged
    key_start: Tensor | None = None


class TritonAttentionRun(FusedAttentionRun):
    """One step over the backend's caches."""

    def __init__(self, backend: TritonAttentionBackend, step: StepShape) -> None:
        self.backend, self.step = backend, step
        self.batch = Ragged(query_start=step.query_start, seq_lens=step.device_seq_lens, block_table=step.block_table,
                            max_query_len=step.max_query_len)
        self._parts: dict[tuple[int, int, int], list[LatentPart]] = {}

    def run(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store_kv(self.backend.caches[layer.index], k, v, self.step.slots, k_scale=layer.k_scale, v_scale=layer.v_scale)
        return self._attend(layer, q)

    def run_qkv(self, layer: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor],
                norms: HeadNorms | None = None) -> Tensor:
        """As `run` of qkv [T, (heads + 2 kv_heads) D] split, normed and rotated: one launch where all only decode, else
        two, and one more where keys are split."""
        if self.step.max_query_len == 1:
            return rope_and_attend(
                qkv, *rope, self.backend.caches[layer.index], self.step.slots, self.batch, heads=layer.num_heads,
                norms=norms, scale=layer.scale, window=layer.sliding_window, k_scale=layer.k_scale,
                v_scale=layer.v_scale)
        q = rope_and_cache(qkv, *rope, self.backend.caches[layer.index], self.step.slots, heads=layer.num_heads,
                           norms=norms, k_scale=layer.k_scale, v_scale=layer.v_scale)
        return self._attend(layer, q)

    def _attend(self, layer: Attention, q: Tensor) -> Tensor:
        return attend_paged(q, self.backend.caches[layer.index], self.batch, scale=layer.scale,
                            window=layer.sliding_window, k_scale=layer.k_scale, v_scale=layer.v_scale)

    def run_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, rows: Tensor) -> Tensor:
        store_kv(self.backend.caches[layer.index], rows[:, None], None, self.step.slots, k_scale=layer.k_scale)
        return self._attend_latent(layer, q_nope, q_pe)

    def run_q_latent(self, layer: MLAAttention, q: Tensor, latent: Tensor, k_pe: Tensor, rope: tuple[Tensor, Tensor],
                     weight: Tensor, eps: float) -> Tensor:
        """As `run_latent`, what comes before it in one launch."""
        q_nope, q_pe = latent_and_cache(
            q, latent, k_pe, *rope, weight, eps, self.backend.caches[layer.index], self.step.slots,
            heads=layer.num_heads, interleaved=layer.interleaved, rounding=layer.latent_rounding,
            kv_scale=layer.k_scale)
        return self._attend_latent(layer, q_nope, q_pe)

    def _attend_latent(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        if self.step.max_query_len == 1:  # what a CUDA graph records: no length is looked at
            return self._absorbed(layer, q_nope, q_pe, self.batch)
        key = (layer.kv_lora_rank, layer.qk_nope_head_dim, layer.v_head_dim)
        if key not in self._parts:
            self._parts[key] = list(self._split(*key))
        parts, out = self._parts[key], q_pe.new_empty(len(q_pe), layer.num_heads, layer.v_head_dim)
        for part in parts:
            these = part.rows
            if part.key_start is None:
                out[these] = self._absorbed(layer, q_nope[these], q_pe[these], part.batch)
            else:
                out[these] = self._expanded(layer, q_nope[these], q_pe[these], part)
        return out

    def _absorbed(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, batch: Ragged) -> Tensor:
        context = attend_latent(absorb(q_nope, layer.w_uk), q_pe, self.backend.caches[layer.index], batch,
                                scale=layer.scale, kv_scale=layer.k_scale)
        return project_values(context, layer.w_uv)

    def _expanded(self, layer: MLAAttention, q_nope: Tensor, q_pe: Tensor, part: LatentPart) -> Tensor:
        """Keys and values of every head are made of the cached rows, in one product."""
        backend, heads, value, latent = self.backend, layer.num_heads, layer.v_head_dim, layer.kv_lora_rank
        assert part.key_start is not None
        lengths = [int(self.step.seq_lens[request]) for request in part.requests]

        def rows_of(request: int, start: int, stop: int) -> Tensor:  # `start` is at a block's first token
            blocks = self.step.block_table[request, start // backend.block_size : -(-stop // backend.block_size)]
            return gather_rows(backend.caches[layer.index], blocks, stop - start, backend.dtype, scale=layer.k_scale)

        total, per_token = sum(lengths), heads * (layer.qk_nope_head_dim + value)
        if total > backend.expanded_tokens:
            [request], [length] = part.requests, lengths
            chunk = max(1, EXPANDED_CHUNK // backend.block_size) * backend.block_size
            return attend_expanded(torch.cat((q_nope, q_pe), -1), lambda a, b: rows_of(request, a, b), length,
                                   layer.w_kv, value=value, scale=layer.scale, chunk=chunk)
        rows = torch.cat([rows_of(request, 0, length) for request, length in zip(part.requests, lengths)])
        kv = backend.expanded[: total * per_token].view(total, per_token)
        torch.mm(rows[:, :latent], layer.w_kv.flatten(0, 1).T, out=kv)
        k, v = kv.view(total, heads, -1).split((layer.qk_nope_head_dim, value), -1)
        return attend_plain(q_nope, q_pe, k, rows[:, None, latent:], v, part.batch, part.key_start, scale=layer.scale)

    def _split(self, latent: int, nope: int, value: int) -> Iterator[LatentPart]:
        """Requests by the way that is cheaper, those to expand in groups that the buffer holds."""
        absorbed, groups, held = [], list[list[int]](), 0
        for request, (query, length) in enumerate(zip(self.step.query_lens.tolist(), self.step.seq_lens.tolist())):
            if absorbing_is_cheaper(query, length, latent=latent, nope=nope, value=value):
                absorbed.append(request)
                continue
            if not groups or held + length > self.backend.expanded_tokens:
                groups.append([])
                held = 0
            groups[-1].append(request)
            held += length
        if absorbed:
            yield self._part(absorbed, expanded=False)
        for group in groups:
            yield self._part(group, expanded=True)

    def _part(self, requests: list[int], *, expanded: bool) -> LatentPart:
        step, device = self.step, self.backend.device
        queries, lengths = step.query_lens[requests], step.seq_lens[requests]
        key_start = self._starts(lengths)[:-1].to(device) if expanded else None
        if len(requests) == len(step.query_lens):
            return LatentPart(rows=slice(None), requests=requests, batch=self.batch, key_start=key_start)
        ends = step.query_lens.cumsum()
        rows = np.concatenate([np.arange(ends[i] - step.query_lens[i], ends[i]) for i in requests])
        index = torch.tensor(requests, device=device)
        batch = Ragged(query_start=self._starts(queries).to(device), seq_lens=step.device_seq_lens[index],
                       block_table=step.block_table[index], max_query_len=int(queries.max()))
        return LatentPart(rows=torch.from_numpy(rows).to(device), requests=requests, batch=batch, key_start=key_start)

    @staticmethod
    def _starts(counts: np.ndarray) -> Tensor:
        """[0, and every sum so far] int32."""
        return torch.from_numpy(np.concatenate(([0], counts.cumsum())).astype(np.int32))
