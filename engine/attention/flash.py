"""FlashAttentionBackend: attention over our cache by what is installed: flash-attn 3, FlashInfer or flash-attn 2."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...csrc.toolchain import find_tools
from ...models import Attention, AttentionLayer
from ...plugins import env
from ..plan import KVCacheLayout
from .base import AttentionProblem, StepShape
from .select import attention_problems
from .triton_paged import TritonAttentionBackend, TritonAttentionRun

# (a layer, its queries [T, heads, D], its cache [2, num_blocks, block_size, kv_heads, D]) -> [T, heads, D]
Attend = Callable[[Attention, Tensor, Tensor], Tensor]
HOPPER = (9, 0)
# What FlashInfer keeps of split keys. It recommends 128 MiB; groups of more than 7 heads of 128 over the 132
# multiprocessors of an H100 need more.
WORKSPACE = 256 << 20


class FlashLibrary(ABC):
    """One library, of a cache's block size and dtype."""

    name: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, *, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size, self.dtype, self.device = block_size, dtype, device

    @classmethod
    def missing(cls, problem: AttentionProblem) -> str | None:
        """Why it cannot run a problem that Triton can (16 bits, no latents); None when it can. Imports nothing."""
        if find_spec(cls.module) is None:
            return f"is not installed ({cls.install})"
        return cls.refusal(problem)

    @classmethod
    @abstractmethod
    def refusal(cls, problem: AttentionProblem) -> str | None:
        """As `missing`, where it is installed."""

    @abstractmethod
    def prepare(self, step: StepShape) -> Attend | None:
        """What attends in all layers of a step; None leaves it to Triton's kernel."""


class FlashAttention3(FlashLibrary):
    """Dao-AILab/flash-attention, `hopper/`: one call for any step, lengths on the device (arXiv 2407.08608)."""

    name: ClassVar[str] = "flash-attn 3"
    module: ClassVar[str] = "flash_attn_interface"
    install: ClassVar[str] = "build hopper/ of github.com/Dao-AILab/flash-attention"

    @classmethod
    def refusal(cls, problem: AttentionProblem) -> str | None:
        major, minor = torch.cuda.get_device_capability(problem.device)
        if (major, minor) != HOPPER:
            return f"is made for compute capability 9.0, this device has {major}.{minor}"
        return _wide(problem)

    def prepare(self, step: StepShape) -> Attend:
        call = import_module(self.module).flash_attn_with_kvcache

        def attend(layer: Attention, q: Tensor, cache: Tensor) -> Tensor:
            return call(q, cache[0], cache[1], cache_seqlens=step.device_seq_lens, page_table=step.block_table,
                        cu_seqlens_q=step.query_start, max_seqlen_q=step.max_query_len, softmax_scale=layer.scale,
                        causal=True, window_size=_window(layer))

        return attend


class FlashAttention2(FlashLibrary):
    """Dao-AILab/flash-attention: pages of 256 tokens alone (arXiv 2307.08691)."""

    name: ClassVar[str] = "flash-attn 2"
    module: ClassVar[str] = "flash_attn_2_cuda"  # flash-attn 4 has a package flash_attn too
    install: ClassVar[str] = "pip install flash-attn"
    page: ClassVar[int] = 256

    @classmethod
    def refusal(cls, problem: AttentionProblem) -> str | None:
        if problem.block_size % cls.page:
            return f"needs blocks of a multiple of {cls.page} tokens, not {problem.block_size}"
        return _wide(problem)

    def prepare(self, step: StepShape) -> Attend:
        library = import_module("flash_attn")
        if step.max_query_len == 1:  # what a CUDA graph records: lengths are read on the device
            def decode(layer: Attention, q: Tensor, cache: Tensor) -> Tensor:
                return library.flash_attn_with_kvcache(
                    q[:, None], cache[0], cache[1], cache_seqlens=step.device_seq_lens, block_table=step.block_table,
                    softmax_scale=layer.scale, causal=True, window_size=_window(layer))[:, 0]

            return decode
        key_start = _starts(step.seq_lens).to(self.device)

        def attend(layer: Attention, q: Tensor, cache: Tensor) -> Tensor:
            return library.flash_attn_varlen_func(
                q, cache[0], cache[1], cu_seqlens_q=step.query_start, cu_seqlens_k=key_start,
                max_seqlen_q=step.max_query_len, max_seqlen_k=int(step.seq_lens.max()), softmax_scale=layer.scale,
                causal=True, window_size=_window(layer), block_table=step.block_table)

        return attend


class Geometry(NamedTuple):
    """What layers must agree on to share a plan."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int


def _cannot_compile() -> str | None:
    """Why FlashInfer would find no compiler: it looks for nvcc in fewer places than our own builder does."""
    tools, reason = find_tools()
    if tools is None:
        return reason
    places = [*env.cuda_homes(), "/usr/local/cuda"]
    if str(tools.nvcc) in (shutil.which("nvcc"), *(f"{place}/bin/nvcc" for place in places)):
        return None
    return f"it does not look for nvcc at {tools.nvcc}: put its folder on PATH"


class FlashInfer(FlashLibrary):
    """flashinfer-ai/flashinfer (arXiv 2501.01005): steps are planned on the host, by lengths that a CUDA graph cannot
    know, so that steps which only decode are Triton's."""

    name: ClassVar[str] = "FlashInfer"
    module: ClassVar[str] = "flashinfer"
    install: ClassVar[str] = "pip install 'nybble[flash]'"
    head_dims: ClassVar[tuple[int, ...]] = (64, 128, 256)

    def __init__(self, *, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(block_size=block_size, dtype=dtype, device=device)
        self.workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        self.wrappers: dict[Geometry, Any] = {}
        self.planned: dict[Geometry, torch.cuda.Event] = {}

    @classmethod
    def refusal(cls, problem: AttentionProblem) -> str | None:
        if problem.head_dim not in cls.head_dims:
            return f"has kernels for heads of {', '.join(map(str, cls.head_dims))}, not {problem.head_dim}"
        if find_spec("flashinfer_jit_cache") is None and (reason := _cannot_compile()):
            return f"compiles its kernels, or has them of the package flashinfer-jit-cache: {reason}"
        return None

    def prepare(self, step: StepShape) -> Attend | None:
        if step.max_query_len == 1:
            return None
        pages, plans = self._pages(step), dict[Geometry, Any]()

        def attend(layer: Attention, q: Tensor, cache: Tensor) -> Tensor:
            geometry = Geometry(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.scale, _window(layer)[0])
            if geometry not in plans:
                plans[geometry] = self._plan(geometry, pages)
            return plans[geometry].run(q, (cache[0], cache[1]))

        return attend

    def _pages(self, step: StepShape) -> tuple[Tensor, ...]:
        """On the host, int32: where queries begin [R + 1], where blocks begin [R + 1], blocks, tokens in each last."""
        counts = -(-step.seq_lens // self.block_size)
        table = step.host_block_table
        blocks = table[np.arange(table.shape[1]) < counts[:, None]]
        last = step.seq_lens - (counts - 1) * self.block_size
        return (_starts(step.query_lens), _starts(counts), torch.from_numpy(blocks.astype(np.int32)),
                torch.from_numpy(last.astype(np.int32)))

    def _plan(self, geometry: Geometry, pages: tuple[Tensor, ...]) -> Any:
        if geometry not in self.wrappers:
            self.wrappers[geometry] = import_module(self.module).BatchPrefillWithPagedKVCacheWrapper(
                self.workspace, "NHD")
        wrapper = self.wrappers[geometry]
        if geometry in self.planned:  # a plan is copied out of pinned memory, which the wrapper's next one overwrites
            self.planned[geometry].synchronize()
        wrapper.plan(*pages, geometry.heads, geometry.kv_heads, geometry.head_dim, self.block_size, causal=True,
                     sm_scale=geometry.scale, window_left=geometry.window, q_data_type=self.dtype,
                     kv_data_type=self.dtype)
        if self.device.type == "cuda":
            self.planned[geometry] = torch.cuda.current_stream(self.device).record_event()
        return wrapper


LIBRARIES: tuple[type[FlashLibrary], ...] = (FlashAttention3, FlashInfer, FlashAttention2)


class FlashAttentionBackend(TritonAttentionBackend):
    """Triton's backend, whose cache and fused writes it keeps, with attention by the first library that can."""

    name: ClassVar[str] = "flash"
    priority: ClassVar[int] = 20

    @classmethod
    def supports(cls, problem: AttentionProblem) -> str | None:
        if problem.kv_lora_rank is not None:
            return "has no attention over latents"
        if (reason := TritonAttentionBackend.supports(problem)) is not None:
            return f"its cache is written by Triton: {reason}"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"computes in 16 bits, not in {str(problem.dtype).removeprefix('torch.')}"
        if problem.cache_dtype != problem.dtype:
            return "reads a cache in the queries' dtype, not in FP8"
        reasons = {library.name: library.missing(problem) for library in LIBRARIES}
        return None if None in reasons.values() else "; ".join(f"{name} {why}" for name, why in reasons.items())

    def __init__(self, layers: Sequence[AttentionLayer], layout: KVCacheLayout, *, dtype: torch.dtype,
                 device: torch.device, cache_dtype: torch.dtype | None = None) -> None:
        super().__init__(layers, layout, dtype=dtype, device=device, cache_dtype=cache_dtype)
        made: dict[type[FlashLibrary], FlashLibrary] = {}
        self.libraries: dict[int, FlashLibrary] = {}  # by a layer's index
        for layer in layers:
            [problem] = attention_problems([layer], dtype=dtype, device=device, block_size=layout.block_size)
            kind = next(library for library in LIBRARIES if library.missing(problem) is None)
            if kind not in made:
                made[kind] = kind(block_size=layout.block_size, dtype=dtype, device=device)
            self.libraries[layer.index] = made[kind]

    def prepare(self, step: StepShape) -> TritonAttentionRun:
        return FlashAttentionRun(self, step)


class FlashAttentionRun(TritonAttentionRun):
    """One step: what is new is stored by Triton's kernels, and attended to by the layer's library."""

    def __init__(self, backend: FlashAttentionBackend, step: StepShape) -> None:
        super().__init__(backend, step)
        attends = {library: library.prepare(step) for library in set(backend.libraries.values())}
        self.attends = {index: attends[library] for index, library in backend.libraries.items()}

    def _attend(self, layer: Attention, q: Tensor) -> Tensor:
        attend = self.attends[layer.index]
        return super()._attend(layer, q) if attend is None else attend(layer, q, self.backend.caches[layer.index])


def _wide(problem: AttentionProblem) -> str | None:
    """Both flash-attn's limits of a head."""
    if problem.head_dim % 8 or problem.head_dim > 256:
        return f"takes heads of a multiple of 8 values up to 256, not {problem.head_dim}"
    return None


def _window(layer: Attention) -> tuple[int, int]:
    """Keys in sight before and after the query's own; -1 sees all."""
    return (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0)


def _starts(counts: np.ndarray) -> Tensor:
    """[0, and every sum so far] int32, on the host."""
    return torch.from_numpy(np.concatenate(([0], counts.cumsum())).astype(np.int32))
