"""FlashAttentionBackend: attention over our cache by what is installed: flash-attn 3, FlashInfer or flash-attn 2."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...csrc.attention import HeadNorms, rope_and_cache
from ...csrc.launch import multiprocessors
from ...models import Attention, AttentionLayer
from ...plugins import env
from ...plugins.log import get_logger
from ..plan import KVCacheLayout
from .base import AttentionProblem, StepShape
from .select import attention_problems
from .triton_paged import TritonAttentionBackend, TritonAttentionRun

log = get_logger(__name__)

# (a layer, its queries [T, heads, D], its cache [2, num_blocks, block_size, kv_heads, D]) -> [T, heads, D]
Attend = Callable[[Attention, Tensor, Tensor], Tensor]
HOPPER = (9, 0)


class FlashLibrary(ABC):
    """One library, for layers whose cache has one block size and dtype."""

    name: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, layers: Sequence[AttentionLayer], *, block_size: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.layers, self.block_size, self.dtype, self.device = layers, block_size, dtype, device

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
        # summed on the device: a copy from the host would wait for the step before this one
        key_start = pad(step.device_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))

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


def _cannot_compile(capability: tuple[int, int]) -> str | None:
    """Why FlashInfer could not build a kernel: it looks in fewer places than our own builder (its jit/cpp_ext.py)."""
    homes, on_path = env.cuda_homes(), shutil.which("nvcc")
    home = Path(homes[0] if homes else Path(on_path).parent.parent if on_path else "/usr/local/cuda")
    if not (home / "bin" / "nvcc").is_file():
        return f"there is no nvcc in {home}/bin: set CUDA_HOME to the CUDA toolkit"
    if capability == HOPPER and not (home / "include" / "curand_kernel.h").is_file():
        return f"{home}/include lacks curand_kernel.h: install cuRAND's headers, or set CUDA_HOME to a whole toolkit"
    if absent := [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]:
        return f"there is no {absent[0]} on PATH"
    return None


class FlashInfer(FlashLibrary):
    """flashinfer-ai/flashinfer (arXiv 2501.01005): steps are planned on the host, by lengths that a CUDA graph cannot
    know, so that steps which only decode are Triton's.

    Which of its kernels is said here: left to itself it may take another from step to step, and would compile that one
    while requests wait.
    """

    name: ClassVar[str] = "FlashInfer"
    module: ClassVar[str] = "flashinfer"
    install: ClassVar[str] = "pip install 'nybble[flash]'"
    head_dims: ClassVar[tuple[int, ...]] = (64, 128, 256)

    def __init__(self, layers: Sequence[AttentionLayer], *, block_size: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__(layers, block_size=block_size, dtype=dtype, device=device)
        self.kernels = "fa3" if torch.cuda.get_device_capability(device) == HOPPER else "fa2"
        self.workspace = torch.empty(self._workspace_bytes(), dtype=torch.uint8, device=device)
        self.wrappers: dict[Geometry, Any] = {}
        self.planned: dict[Geometry, torch.cuda.Event] = {}

    @classmethod
    def refusal(cls, problem: AttentionProblem) -> str | None:
        if problem.head_dim not in cls.head_dims:
            return f"has kernels for heads of {', '.join(map(str, cls.head_dims))}, not {problem.head_dim}"
        capability = torch.cuda.get_device_capability(problem.device)
        if find_spec("flashinfer_jit_cache") is None and (reason := _cannot_compile(capability)):
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

    def _workspace_bytes(self) -> int:
        """For the float32 outputs of split keys and a sum with each: keys are split until there are two blocks of
        threads a multiprocessor, each of a tile of queries (PrefillPlan in its scheduler.cuh). "fa3" splits none."""
        if self.kernels == "fa3":
            return 16  # an empty tensor has no address
        blocks = 2 * multiprocessors(self.device)
        return max(blocks // layer.num_kv_heads * layer.num_heads * (128 if layer.head_dim < 256 else 64)
                   * (layer.head_dim + 1) * torch.float32.itemsize for layer in self.layers)

    def _pages(self, step: StepShape) -> tuple[Tensor, ...]:
        """On the host, int32: where queries begin [R + 1], where blocks begin [R + 1], blocks, tokens in each last.

        Pinned, since a copy of pageable memory may wait for the step before this one.
        """
        counts = -(-step.seq_lens // self.block_size)
        table = step.host_block_table
        blocks = table[np.arange(table.shape[1]) < counts[:, None]]
        last = step.seq_lens - (counts - 1) * self.block_size
        pages = [torch.from_numpy(array.astype(np.int32))
                 for array in (_starts(step.query_lens), _starts(counts), blocks, last)]
        return tuple(page.pin_memory() if self.device.type == "cuda" else page for page in pages)

    def _plan(self, geometry: Geometry, pages: tuple[Tensor, ...]) -> Any:
        if geometry not in self.wrappers:
            log.info("FlashInfer attends to prompts, heads of %d: a kernel that it has not compiled here yet takes a "
                     "minute or two", geometry.head_dim)
            self.wrappers[geometry] = import_module(self.module).BatchPrefillWithPagedKVCacheWrapper(
                self.workspace, "NHD", backend=self.kernels)
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
        takes: dict[type[FlashLibrary], list[AttentionLayer]] = {}
        for layer in layers:
            [problem] = attention_problems([layer], dtype=dtype, device=device, block_size=layout.block_size)
            takes.setdefault(next(kind for kind in LIBRARIES if kind.missing(problem) is None), []).append(layer)
        self.libraries: dict[int, FlashLibrary] = {}  # by a layer's index
        for kind, its in takes.items():
            library = kind(its, block_size=layout.block_size, dtype=dtype, device=device)
            self.libraries.update({layer.index: library for layer in its})

    def prepare(self, step: StepShape) -> TritonAttentionRun:
        return FlashAttentionRun(self, step)


class FlashAttentionRun(TritonAttentionRun):
    """One step: what is new is stored by Triton's kernels, and attended to by the layer's library."""

    def __init__(self, backend: FlashAttentionBackend, step: StepShape) -> None:
        super().__init__(backend, step)
        attends = {library: library.prepare(step) for library in set(backend.libraries.values())}
        self.attends = {index: attends[library] for index, library in backend.libraries.items()}

    def run_qkv(self, layer: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor],
                norms: HeadNorms | None = None) -> Tensor:
        """As Triton's, which for a step that only decodes attends in the same launch: a library cannot."""
        if self.attends[layer.index] is None:
            return super().run_qkv(layer, qkv, rope, norms)
        q = rope_and_cache(qkv, *rope, self.backend.caches[layer.index], self.step.slots, heads=layer.num_heads,
                           norms=norms)
        return self._attend(layer, q)

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


def _starts(counts: np.ndarray) -> np.ndarray:
    """[0, and every sum so far]."""
    return np.concatenate(([0], counts.cumsum()))
