"""The flash backend over stand-ins of its libraries, which take what flash-attn 2.8.3 (and its hopper/) and FlashInfer
0.6.12 take, refuse what those refuse, and compute in torch: the same numbers as the torch backend's, and refusals."""

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


def as_flash_attn_takes(q, caches, table, *int32):
    """What both flash-attns' C++ checks of a paged call, of `int32` one for each request or one more."""
    rows = len(table)
    assert table.dtype == torch.int32 and table.dim() == 2 and table.stride(-1) == 1
    assert all(x.dtype == torch.int32 and x.is_contiguous() and len(x) in (rows, rows + 1) for x in int32)
    assert all(x.dtype == q.dtype and x.stride(-1) == 1 and x.device == q.device for x in (q, *caches))


def modules(calls: list[str]) -> dict[str, dict[str, object]]:
    """By library, its modules and their members."""
    def kvcache3(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                 cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
                 max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
                 softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                 rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
                 return_softmax_lse=False):
        as_flash_attn_takes(q, (k_cache, v_cache), page_table, cache_seqlens, cu_seqlens_q)
        assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and len(cache_seqlens) == len(page_table)
        calls.append("kvcache")
        return paged(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, window_size)

    def kvcache2(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                 cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
                 window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
                 return_softmax_lse=False):
        as_flash_attn_takes(q, (k_cache, v_cache), block_table, cache_seqlens)
        assert causal and k_cache.shape[1] % 256 == 0 and q.shape[:2] == (len(block_table), 1)
        assert len(cache_seqlens) == len(block_table)
        calls.append("kvcache")
        starts = torch.arange(len(q) + 1)
        return paged(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, window_size)[:, None]

    def varlen2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                return_attn_probs=False, block_table=None):
        lengths = cu_seqlens_k.diff()
        as_flash_attn_takes(q, (k, v), block_table, cu_seqlens_q, cu_seqlens_k)
        assert causal and k.shape[1] % 256 == 0 and len(lengths) == len(block_table)
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), lengths.max())
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        calls.append("varlen")
        return paged(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, window_size)

    class Wrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
                     paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
                     custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD" and not use_cuda_graph
            assert backend == ("fa3" if torch.cuda.get_device_capability() == (9, 0) else "fa2")
            self.workspace, self.backend = float_workspace_buffer, backend

        def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
                 head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
                 pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
                 logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
                 o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
                 token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None,
                 max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False):
            arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            assert all(a.dtype == torch.int32 and a.device.type == "cpu" for a in arrays)
            assert (num_qo_heads, num_kv_heads, head_dim_qk, causal) == (HEADS, KV_HEADS, DIM, True)
            assert len(paged_kv_indices) == paged_kv_indptr[-1]
            assert paged_kv_last_page_len.min() >= 1 and paged_kv_last_page_len.max() <= page_size
            assert isinstance(window_left, int) and q_data_type == kv_data_type
            calls.append("plan")
            self.tables = paged_kv_indices.split(paged_kv_indptr.diff().tolist())
            self.lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
            self.starts, self.scale, self.window, self.dtype = qo_indptr, sm_scale, (window_left, 0), q_data_type

        def run(self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
                return_lse=False, enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None,
                skip_softmax_threshold_scale_factor=None):
            k, v = paged_kv_cache
            assert len(q) == self.starts[-1] and k.stride() == v.stride() and q.dtype == k.dtype == self.dtype
            calls.append("run")
            return paged(q, k, v, self.starts, self.lengths, self.tables, self.scale, self.window)

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


def check(block: int, step: str) -> None:
    """As the torch backend, for three layers, one with a window, from the same cache, poisoned where unwritten."""
    query_lens, seq_lens = STEPS[step]
    layers = [Attention(i, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, sliding_window=window)
              for i, window in enumerate(WINDOWS)]
    rng, most = torch.Generator().manual_seed(0), -(-max(seq_lens) // block)
    table = (torch.randperm(most * len(seq_lens), generator=rng) + 1).int().view(len(seq_lens), most)
    slots = torch.cat([table[row, torch.arange(n) // block].long() * block + torch.arange(n) % block
                       for row, n in enumerate(seq_lens)])
    new = torch.cat([torch.arange(n) >= n - q for q, n in zip(query_lens, seq_lens)])
    k, v = torch.randn(2, len(slots), KV_HEADS, DIM, generator=rng)
    q = torch.randn(sum(query_lens), HEADS, DIM, generator=rng)
    shape = StepShape(query_lens=np.array(query_lens), seq_lens=np.array(seq_lens), block_table=table,
                      host_block_table=table.numpy(), slots=slots[new], max_query_len=max(query_lens),
                      query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
                      device_seq_lens=torch.tensor(seq_lens, dtype=torch.int32))
    results = []
    for kind in (TorchPagedBackend, FlashAttentionBackend):
        backend = kind(layers, KVCacheLayout(num_blocks=table.numel() + 1, block_size=block, groups=[]),
                       dtype=torch.float32, device=torch.device("cpu"))
        for cache in backend.caches:
            cache.fill_(float("nan"))
            write_kv(cache, k[~new], v[~new], slots[~new])
        run = backend.prepare(shape)
        if kind is TorchPagedBackend:
            results.append([run.run(layer, q, k[new], v[new]) for layer in layers])
        else:  # as a layer runs it, by angles of zero
            ones = torch.ones(len(q), 1, DIM)
            qkv, rope = torch.cat((q, k[new], v[new]), 1).flatten(1), (ones, 0 * ones)
            results.append([run.run_qkv(layer, qkv, rope) for layer in layers])
    eps = torch.finfo(torch.float32).eps
    for reference, ours in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=8 * eps, atol=8 * eps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cache is written by Triton's interpreter")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("library, block", [("flash-attn 3", 16), ("flash-attn 2", 256), ("FlashInfer", 16)])
def test_the_libraries_are_called_as_they_want(install, library, block, step):
    calls = install(library)
    check(block, step)
    assert calls == CALLS[library][step != "decode"]


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


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """What FlashInfer compiles with on a Hopper, named by CUDA_HOME."""
    for file in ("bin/nvcc", "include/curand_kernel.h"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(flash.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def test_flashinfer_compiles_or_has_its_kernels(install, monkeypatch, toolkit):
    install("FlashInfer")
    monkeypatch.delitem(sys.modules, "flashinfer_jit_cache")
    assert FlashAttentionBackend.supports(PROBLEM) is None
    (toolkit / "bin" / "nvcc").unlink()
    assert (f"FlashInfer compiles its kernels, or has them of the package flashinfer-jit-cache: there is no nvcc in "
            f"{toolkit}/bin: set CUDA_HOME") in FlashAttentionBackend.supports(PROBLEM)


def test_flashinfer_looks_for_nvcc_in_one_place(monkeypatch, toolkit):
    """CUDA_HOME, else CUDA_PATH, else the first on PATH, and never in the next."""
    assert flash._cannot_compile((9, 0)) is None
    monkeypatch.setenv("CUDA_PATH", "/nowhere")
    assert flash._cannot_compile((9, 0)) is None
    monkeypatch.delenv("CUDA_HOME")
    assert "no nvcc in /nowhere/bin" in flash._cannot_compile((9, 0))
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.setattr(flash.shutil, "which", lambda name: str(toolkit / "bin" / name))
    assert flash._cannot_compile((9, 0)) is None


def test_what_else_flashinfer_compiles_with(monkeypatch, toolkit):
    (toolkit / "include" / "curand_kernel.h").unlink()
    assert f"{toolkit}/include lacks curand_kernel.h" in flash._cannot_compile((9, 0))
    assert flash._cannot_compile((8, 0)) is None  # CUTLASS, which asks for it, is of its kernels for Hopper
    monkeypatch.setattr(flash.shutil, "which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")
    assert flash._cannot_compile((8, 0)) == "there is no ninja on PATH"


@pytest.mark.parametrize("capability, processors, heads, kv_heads, dim", [
    ((8, 0), 108, 32, 8, 128), ((10, 0), 148, 64, 4, 128), ((12, 0), 188, 40, 8, 256), ((9, 0), 132, 64, 4, 128)])
def test_flashinfer_has_room_for_split_keys(install, monkeypatch, capability, processors, heads, kv_heads, dim):
    """As its PrefillPlan counts: keys are split until every multiprocessor has two blocks, over all KV heads."""
    install("FlashInfer")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(flash, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: SimpleNamespace(size=shape))
    layers = [Attention(i, num_heads=heads, num_kv_heads=kv, head_dim=dim) for i, kv in enumerate((heads, kv_heads))]
    library = flash.FlashInfer(layers, block_size=16, dtype=torch.float16, device=torch.device("cpu"))
    padded, tile = 2 * processors // kv_heads, 64 if dim == 256 else 128
    needed = heads * padded * tile * dim * 4 + heads * padded * tile * 4
    assert library.workspace.size == ((16,) if capability == (9, 0) else (needed,))
