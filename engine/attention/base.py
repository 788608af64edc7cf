"""The attention backend protocol: what one allocates, prepares once a step, and runs in every layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...models import AttentionLayer, AttentionRun
from ..plan import KVCacheLayout


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """What a backend must be able to run; `supports` answers with a reason when it cannot.

    With `kv_lora_rank` it is latent attention (`AttentionRun.run_latent`): one row of that many latent values, then
    the rotated key, serves all heads, and `head_dim` is a query's width before anything is absorbed. `cache_dtype` is
    `dtype` or float8_e4m3fn, of which a cached value times its layer's `k_scale` or `v_scale` is the value.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    kv_lora_rank: int | None
    sliding_window: int | None
    block_size: int
    cache_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One step's geometry, request by request in batch order (R requests, T tokens).

    Attributes:
        query_lens [R], seq_lens [R]: tokens computed now, and tokens in the cache after them (host int32).
        block_table: [R, max_blocks] on the device, rows valid up to ceil(seq_len / block_size).
        host_block_table: the same on the host.
        slots: [T] int64 on the device: where each new token's K and V go, block * block_size + offset.
        query_start: [R + 1] int32 on the device: where each request's tokens begin, and T.
        device_seq_lens: `seq_lens` on the device (int32).
        max_query_len: the largest of `query_lens`. With 1 nothing else of the host's side may be looked at: the step
            may be recorded for other lengths (CUDA graphs).
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray
    block_table: Tensor
    host_block_table: np.ndarray
    slots: Tensor
    query_start: Tensor
    device_seq_lens: Tensor
    max_query_len: int


class AttentionBackend(ABC):
    """One way to run attention over the paged cache. A plugin of kind "attention_backend"."""

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    capturable: ClassVar[bool] = False
    """Whether a step with `max_query_len` 1 looks at device memory only, so that a CUDA graph can record it."""

    @classmethod
    @abstractmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        """None when it can run `problem`, else the reason why not."""

    @classmethod
    def explain(cls, problem: AttentionProblem) -> dict[str, str]:
        """What of `problem` has, or might have, a kernel of its own: which one runs it, and why not another."""
        return {}

    @abstractmethod
    def __init__(self, layers: Sequence[AttentionLayer], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device, cache_dtype: torch.dtype | None = None) -> None:
        """Allocate the cache of every layer, of `cache_dtype` (None: `dtype`).

        Its content is unspecified: only written slots are ever read.
        """

    @staticmethod
    def allocate(layers: Sequence[AttentionLayer], layout: KVCacheLayout, dtype: torch.dtype,
                 device: torch.device) -> list[Tensor]:
        """A cache [planes, num_blocks, block_size, heads, width] for each layer, not initialised."""
        return [
            torch.empty(planes, layout.num_blocks, layout.block_size, heads, width, dtype=dtype, device=device)
            for planes, heads, width in (layer.kv_shape for layer in layers)
        ]

    @abstractmethod
    def prepare(self, step: StepShape) -> AttentionRun:
        """Whatever all layers of a step share."""
