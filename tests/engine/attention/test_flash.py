"""The flash backend over stand-ins of its libraries, which have their signatures and compute in torch: the same numbers
as the torch backend's, refusals, and, where a library is installed on a GPU, the library itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from nybble.csrc.attention import write_kv
from nybble.engine.attention import flash
from nybble.engine.attention.base import AttentionProblem, StepShape
from nybble.engine.attention.flash import FlashAttentionBackend
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.attention.triton_paged import TritonAttentionBackend
from nybble.engine.plan import KVCacheLayout
from nybble.models import Attention
from nybble.plugins.builtin import nybble_attention_backends

HEADS, KV_HEADS, DIM = 8, 2, 64
WINDOWS = (None, 12, None)
PROBLEM = AttentionProblem(device=torch.device("cuda"), dtype=torch.float16, cache_dtype=torch.float16, head_dim=DIM,
                           num_heads=HEADS, num_kv_heads=KV_HEADS, kv_lora_rank=None, sliding_window=None,
                           block_size=256)


def attend(q, k, v, scale: float, window: tuple[int, int]):
    """q [Q, H, D] are the last of the keys' positions; what flash-attn calls causal, and its inclusive window."""
    at = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    keys = torch.arange(len(k), device=q.device)
    seen = (keys <= at) & ((window[0] < 0) | (keys >= at - window[0]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def paged(q, k_cache, v_cache, starts, lengths, tables, scale: float, window: tuple[int, int]):
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (KV_HEADS, DIM) and q.shape[1:] == (HEADS, DIM)
    out = []
    for start, end, table, length in zip(starts, starts[1:], tables, lengths):
        k, v = (cache[table].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out.append(attend(q[start:end], k, v, scale, window))
    return torch.cat(out)


def modules(calls: list[str]) -> dict[str, dict[str, object]]:
    """By library, its modules and their members."""
    def kvcache3(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                 cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
                 max_seqlen_q=None, *, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and cache_seqlens.dtype == torch.int32
        calls.append("kvcache")
        return paged(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, window_size)

    def kvcache2(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                 cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
                 window_size=(-1, -1)):
        assert causal and k_cache.shape[1] % 256 == 0 and q.shape[1] == 1
        calls.append("kvcache")
        starts = torch.arange(len(q) + 1)
        return paged(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, window_size)[:, None]

    def varlen2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                return_attn_probs=False, block_table=None):
        lengths = cu_seqlens_k.diff()
        assert causal and k.shape[1] % 256 == 0 and cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), lengths.max())
        calls.append("varlen")
        return paged(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, window_size)

    class Wrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD" and not use_cuda_graph

        def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
                 head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
                 pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, *,
                 q_data_type="float16", kv_data_type=None):
            arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            assert all(a.dtype == torch.int32 and a.device.type == "cpu" for a in arrays)
            assert (num_qo_heads, num_kv_heads, head_dim_qk, causal) == (HEADS, KV_HEADS, DIM, True)
            assert len(paged_kv_indices) == paged_kv_indptr[-1] and paged_kv_last_page_len.min() >= 1
            assert q_data_type == kv_data_type == torch.float32
            calls.append("plan")
            self.tables = paged_kv_indices.split(paged_kv_indptr.diff().tolist())
            self.lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
            self.starts, self.scale, self.window = qo_indptr, sm_scale, (window_left, 0)

        def run(self, q, paged_kv_cache):
            calls.append("run")
            return paged(q, *paged_kv_cache, self.starts, self.lengths, self.tables, self.scale, self.window)

    return {
        "flash-attn 3": {"flash_attn_interface": dict(flash_attn_with_kvcache=kvcache3)},
        "flash-attn 2": {"flash_attn_2_cuda": {},
                         "flash_attn": dict(flash_attn_with_kvcache=kvcache2, flash_attn_varlen_func=varlen2)},
        "FlashInfer": {"flashinfer": dict(BatchPrefillWithPagedKVCacheWrapper=Wrapper), "flashinfer_jit_cache": {}},
    }


@pytest.fixture
def install(monkeypatch):
    """install(name): that library's stand-in is there, on a Hopper; returns the calls that it will get."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("nybble.csrc.launch.find_spec", lambda name: object())
    monkeypatch.setattr(flash, "find_tools", lambda: (None, "no nvcc"))
    monkeypatch.setattr(flash, "find_spec", lambda name: sys.modules.get(name))

    def add(name: str) -> list[str]:
        calls: list[str] = []
        for module, members in modules(calls)[name].items():
            made = ModuleType(module)
            made.__spec__ = ModuleSpec(module, None)
            vars(made).update(members)
            monkeypatch.setitem(sys.modules, module, made)
        return calls

    for module in ("flash_attn_interface", "flash_attn_2_cuda", "flashinfer", "flashinfer_jit_cache"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return add


STEPS = {"decode": ([1, 1, 1], [5, 400, 33]), "prefill": ([17, 3], [17, 3]), "chunk": ([17, 1], [300, 40]),
         "mixed": ([1, 9, 1, 20], [40, 9, 257, 36])}
# What a step that only decodes calls, and any other; two of the three layers share a plan.
CALLS = {"flash-attn 3": (["kvcache"] * 3, ["kvcache"] * 3), "flash-attn 2": (["kvcache"] * 3, ["varlen"] * 3),
         "FlashInfer": ([], ["plan", "run", "plan", "run", "run"])}


def check(device: torch.device, dtype: torch.dtype, block: int, step: str) -> None:
    """As the torch backend, for three layers, one with a window, from the same cache, poisoned where unwritten."""
    query_lens, seq_lens = STEPS[step]
    layers = [Attention(i, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, sliding_window=window)
              for i, window in enumerate(WINDOWS)]
    rng, most = torch.Generator().manual_seed(0), -(-max(seq_lens) // block)
    table = (torch.randperm(most * len(seq_lens), generator=rng) + 1).int().view(len(seq_lens), most)
    slots = torch.cat([table[row, torch.arange(n) // block].long() * block + torch.arange(n) % block
                       for row, n in enumerate(seq_lens)])
    new = torch.cat([torch.arange(n) >= n - q for q, n in zip(query_lens, seq_lens)])
    k, v = torch.randn(2, len(slots), KV_HEADS, DIM, generator=rng).to(device, dtype)
    q = torch.randn(sum(query_lens), HEADS, DIM, generator=rng).to(device, dtype)
    shape = StepShape(query_lens=np.array(query_lens), seq_lens=np.array(seq_lens), block_table=table.to(device),
                      host_block_table=table.numpy(), slots=slots[new].to(device), max_query_len=max(query_lens),
                      query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
                      device_seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device))
    results = []
    for kind in (TorchPagedBackend, FlashAttentionBackend):
        backend = kind(layers, KVCacheLayout(num_blocks=table.numel() + 1, block_size=block, groups=[]), dtype=dtype,
                       device=device)
        for cache in backend.caches:
            cache.fill_(float("nan"))
            write_kv(cache, k[~new], v[~new], slots[~new].to(device))
        run = backend.prepare(shape)
        results.append([run.run(layer, q, k[new], v[new]) for layer in layers])
    eps = torch.finfo(dtype).eps
    for reference, ours in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=8 * eps, atol=8 * eps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cache is written by Triton's interpreter")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("library, block", [("flash-attn 3", 16), ("flash-attn 2", 256), ("FlashInfer", 16)])
def test_the_libraries_are_called_as_they_want(install, library, block, step):
    calls = install(library)
    check(torch.device("cpu"), torch.float32, block, step)
    assert calls == CALLS[library][step != "decode"]


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("block", [16, 256])
def test_an_installed_library(step, block):
    if reason := FlashAttentionBackend.supports(replace(PROBLEM, block_size=block)):
        pytest.skip(reason)
    check(torch.device("cuda"), torch.float16, block, step)


@pytest.mark.parametrize("library, change, words", [
    (None, {}, "flash-attn 3 is not installed (build hopper/ of github.com/Dao-AILab/flash-attention); FlashInfer is "
               "not installed (pip install 'nybble[flash]'); flash-attn 2 is not installed (pip install flash-attn)"),
    ("FlashInfer", dict(device=torch.device("cpu")), "its cache is written by Triton: runs on CUDA, not on cpu"),
    ("FlashInfer", dict(kv_lora_rank=512), "has no attention over latents"),
    ("FlashInfer", dict(dtype=torch.float32), "computes in 16 bits, not in float32"),
    ("FlashInfer", dict(cache_dtype=torch.float8_e4m3fn), "reads a cache in the queries' dtype, not in FP8"),
    ("FlashInfer", dict(head_dim=80), "FlashInfer has kernels for heads of 64, 128, 256, not 80"),
    ("flash-attn 3", dict(head_dim=100), "flash-attn 3 takes heads of a multiple of 8 values up to 256, not 100"),
    ("flash-attn 2", dict(block_size=16), "flash-attn 2 needs blocks of a multiple of 256 tokens, not 16"),
    *((library, {}, None) for library in CALLS),
])
def test_refusals(install, library, change, words):
    if library is not None:
        install(library)
    found = FlashAttentionBackend.supports(replace(PROBLEM, **change))
    assert found is None if words is None else words in found


@pytest.mark.parametrize("library, capability, words", [
    ("flash-attn 3", (8, 9), "flash-attn 3 is made for compute capability 9.0, this device has 8.9"),
    ("FlashInfer", (7, 5), "needs compute capability 8.0, this device has 7.5"), ("FlashInfer", (8, 9), None),
])
def test_other_devices(install, monkeypatch, library, capability, words):
    install(library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = FlashAttentionBackend.supports(PROBLEM)
    assert found is None if words is None else words in found


def test_flashinfer_without_a_compiler(install, monkeypatch):
    install("FlashInfer")
    monkeypatch.delitem(sys.modules, "flashinfer_jit_cache")
    assert "flashinfer-jit-cache: no nvcc" in FlashAttentionBackend.supports(PROBLEM)


def test_layers_take_the_first_library_that_can(install):
    """FlashInfer where there are kernels for a head, else flash-attn 2."""
    install("FlashInfer"), install("flash-attn 2")
    layers = [Attention(i, num_heads=2, num_kv_heads=1, head_dim=dim) for i, dim in enumerate((64, 80, 128))]
    backend = FlashAttentionBackend(layers, KVCacheLayout(num_blocks=2, block_size=256, groups=[]),
                                    dtype=torch.float16, device=torch.device("cpu"))
    assert [backend.libraries[i].name for i in range(3)] == ["FlashInfer", "flash-attn 2", "FlashInfer"]
    assert backend.libraries[0] is backend.libraries[2]


def test_registration():
    assert nybble_attention_backends()["flash"] == "nybble.engine.attention.flash:FlashAttentionBackend"
    assert FlashAttentionBackend.priority > TritonAttentionBackend.priority


def test_a_compiler_that_flashinfer_does_not_find(monkeypatch, tmp_path):
    """Our builder looks in more places, nvidia's packages among them."""
    found = tmp_path / "bin" / "nvcc"
    monkeypatch.setattr(flash, "find_tools", lambda: (SimpleNamespace(nvcc=found), ""))
    assert str(found) in flash._cannot_compile()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert flash._cannot_compile() is None
