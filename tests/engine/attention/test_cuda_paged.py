"""The CUDA backend: each request of a mixed step goes to the kernels or to torch, and finds its way back."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch

from nybble.csrc.attention import attend, gather_kv, write_kv
from nybble.engine.attention import cuda_paged
from nybble.engine.attention.base import AttentionProblem, StepShape
from nybble.engine.attention.cuda_paged import PagedAttention
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.plan import KVCacheLayout
from nybble.models import Attention

BLOCK, HEADS, KV_HEADS, DIM = 16, 8, 2, 64


class Kernels:
    """The kernels' doors in plain torch, which count who calls them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(cuda_paged, "paged_attention_v1", self.v1)
        monkeypatch.setattr(cuda_paged, "paged_attention_v2", self.v2)
        monkeypatch.setattr(cuda_paged, "reshape_and_cache",
                            lambda k, v, cache, slots, **scales: write_kv(cache, k, v, slots, **scales))

    def v1(self, out, q, cache, table, lengths, *, scale, window, k_scale, v_scale):
        assert k_scale == v_scale == 1, "the cache is not FP8"
        self.calls.append("v1")
        for row, length in enumerate(lengths.tolist()):
            k, v = gather_kv(cache, table[row, : -(-length // cache.shape[2])], length)
            seen = slice(-window if window else None, None)
            out[row] = attend(q[row][None], k[seen], v[seen], scale=scale)[0]

    def v2(self, out, workspace, *args, **options):
        assert workspace.partial.shape[2] * workspace.tokens >= args[3].max()
        self.v1(out, *args, **options)
        self.calls[-1] = "v2"


STEPS = {
    "decode": ([1, 1, 1], [5, 40, 33], ["v1", "v1"]),
    "long decode": ([1], [600], ["v2", "v2"]),
    "prefill": ([17, 3], [17, 50], []),
    "mixed": ([1, 9, 1, 20], [40, 9, 17, 36], ["v1", "v1"]),
}


def check(device: torch.device, dtype: torch.dtype, query_lens: list[int], seq_lens: list[int]) -> None:
    """Both backends give the same for two layers, one with a window, from the same cache, poisoned where unwritten."""
    layers = [Attention(i, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, sliding_window=window)
              for i, window in enumerate((None, 12))]
    rng, most = torch.Generator().manual_seed(0), -(-max(seq_lens) // BLOCK)
    table = (torch.randperm(most * len(seq_lens), generator=rng) + 1).int().view(len(seq_lens), most)
    layout = KVCacheLayout(num_blocks=table.numel() + 1, block_size=BLOCK, groups=[])
    slots = torch.cat([table[row, torch.arange(n) // BLOCK].long() * BLOCK + torch.arange(n) % BLOCK
                       for row, n in enumerate(seq_lens)])
    new = torch.cat([torch.arange(n) >= n - q for q, n in zip(query_lens, seq_lens)])
    k, v = torch.randn(2, len(slots), KV_HEADS, DIM, generator=rng).to(dtype)
    q = torch.randn(sum(query_lens), HEADS, DIM, generator=rng).to(dtype)
    starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
    step = StepShape(query_lens=np.array(query_lens), seq_lens=np.array(seq_lens), block_table=table.to(device),
                     host_block_table=table.numpy(), slots=slots[new].to(device), query_start=starts.to(device),
                     device_seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
                     max_query_len=max(query_lens))
    results = []
    for kind in (TorchPagedBackend, PagedAttention):
        backend = kind(layers, layout, dtype=dtype, device=device)
        for cache in backend.caches:
            cache.fill_(float("nan"))
            write_kv(cache, k[~new].to(device), v[~new].to(device), slots[~new].to(device))
        run = backend.prepare(step)
        results.append([run.run(layer, *(x.to(device) for x in (q, k[new], v[new]))) for layer in layers])
    eps = torch.finfo(dtype).eps
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("query_lens, seq_lens, calls", STEPS.values(), ids=STEPS)
def test_decoding_goes_to_the_kernels_and_prompts_to_torch(monkeypatch, query_lens, seq_lens, calls):
    kernels = Kernels(monkeypatch)
    check(torch.device("cpu"), torch.float32, query_lens, seq_lens)
    assert kernels.calls == calls  # a CPU counts as one multiprocessor: only few sequences are worth splitting


@pytest.mark.gpu
@pytest.mark.parametrize("query_lens, seq_lens, calls", STEPS.values(), ids=STEPS)
def test_on_a_device(query_lens, seq_lens, calls):
    check(torch.device("cuda"), torch.float16, query_lens, seq_lens)


def test_latents_and_other_devices_are_refused():
    problem = AttentionProblem(device=torch.device("cpu"), dtype=torch.float16, cache_dtype=torch.float16, head_dim=DIM,
                               num_heads=HEADS, num_kv_heads=KV_HEADS, kv_lora_rank=None, sliding_window=None,
                               block_size=BLOCK)
    assert PagedAttention.supports(problem) == "runs on CUDA, not on cpu"
    assert PagedAttention.supports(replace(problem, kv_lora_rank=512)) == "has no kernel for latent attention"
