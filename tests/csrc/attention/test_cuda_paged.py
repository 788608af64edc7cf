"""The CUDA decode kernels against attention in float64, over ragged batches whose unseen slots are poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nybble.csrc import ops
from nybble.csrc.attention import cuda_paged, write_kv
from nybble.csrc.attention.cuda_paged import (
    HEAD_SIZES,
    PARTITION,
    Workspace,
    paged_attention_missing,
    paged_attention_v1,
    paged_attention_v2,
    partition_tokens,
    reshape_and_cache,
    reshape_and_cache_missing,
)

DEVICE = torch.device("cuda")
LENGTHS = (1, 15, 0, 16, 17, 511, 512, 513, 2000, 0)
FP8 = torch.float8_e4m3fn
POISON = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decode step over a cache in which every slot that no query sees is NaN."""

    dtype: torch.dtype = torch.float16
    fp8: bool = False
    group: int = 4
    kv_heads: int = 2
    dim: int = 128
    block: int = 16
    window: int | None = None
    lengths: tuple[int, ...] = LENGTHS

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("-fp8" if self.fp8 else "")
        return f"{kind}-D{self.dim}-group{self.group}-block{self.block}-window{self.window}"

    @property
    def scales(self) -> dict[str, float]:
        return dict(k_scale=0.03, v_scale=0.02) if self.fp8 else {}

    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, cache, block_table, seq_lens, and the answer [R, heads, D] in float64."""
        rng = torch.Generator().manual_seed(0)
        heads, wide = self.group * self.kv_heads, (self.group + 2) * self.kv_heads
        q = torch.randn(len(self.lengths), wide, self.dim, generator=rng).to(self.dtype)[:, :heads]  # a part of qkv
        counts = [-(-length // self.block) for length in self.lengths]
        order = torch.randperm(sum(counts), generator=rng) + 1  # block 0 is all poison
        table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        cache = torch.full((2, len(order) + 1, self.block, self.kv_heads, self.dim), POISON, dtype=self.dtype)
        cache = cache.to(FP8) if self.fp8 else cache
        answer = torch.zeros(len(counts), heads, self.dim, dtype=torch.float64)
        for row, (length, blocks) in enumerate(zip(self.lengths, order.split(counts))):
            if length == 0:
                continue
            table[row, : len(blocks)] = blocks
            seen = torch.arange(max(0, length - (self.window or length)), length)
            slots = blocks[seen // self.block] * self.block + seen % self.block
            k, v = torch.randn(2, len(seen), self.kv_heads, self.dim, generator=rng).to(self.dtype)
            write_kv(cache, k, v, slots, **self.scales)
            stored = cache.view(torch.uint8) if self.fp8 else cache
            k, v = stored.flatten(1, 2)[:, slots].view(cache.dtype).double().repeat_interleave(self.group, 2)
            k, v = k * self.scales.get("k_scale", 1), v * self.scales.get("v_scale", 1)
            scores = torch.einsum("hd,lhd->hl", q[row].double(), k) * self.dim**-0.5
            answer[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
        return (*(x.to(DEVICE) for x in (q, cache, table, torch.tensor(self.lengths, dtype=torch.int32))), answer)

    def check(self, version: int, tokens: int = PARTITION) -> None:
        q, cache, table, lengths, answer = self.make()
        q = torch.empty_strided(q.shape, (q.shape[1] * self.dim * 2, self.dim, 1), dtype=q.dtype,
                                device=q.device).copy_(q)
        out = torch.full(q.shape, POISON, dtype=q.dtype, device=DEVICE)
        options = dict(scale=self.dim**-0.5, window=self.window, **self.scales)
        if version == 1:
            paged_attention_v1(out, q, cache, table, lengths, **options)
        else:  # a workspace for longer sequences than there are, as a captured graph has it
            workspace = Workspace.of(len(q), q.shape[1], self.dim, 2 * max(self.lengths), DEVICE, tokens)
            for part in workspace[:3]:
                part.fill_(POISON)
            paged_attention_v2(out, workspace, q, cache, table, lengths, **options)
        eps = torch.finfo(self.dtype).eps  # probabilities and the result are rounded once each
        torch.testing.assert_close(out.cpu().double(), answer, rtol=2 * eps, atol=3 * eps)


CASES = [
    *(Case(dtype=dtype, fp8=fp8, dim=dim) for dim in HEAD_SIZES for dtype in (torch.float16, torch.bfloat16)
      for fp8 in (False, True)),
    *(Case(group=group, kv_heads=kv_heads, fp8=fp8) for group, kv_heads in ((1, 3), (7, 4), (8, 1), (16, 1), (17, 2))
      for fp8 in (False, True)),
    *(Case(block=block, fp8=fp8, dim=64) for block in (8, 32, 64) for fp8 in (False, True)),
    *(Case(window=window, block=block) for window in (1, 16, 100, 513, 4096) for block in (8, 64)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, version):
    case.check(version)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 700])
def test_larger_partitions(window):
    Case(window=window).check(2, 2 * PARTITION)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (1,)], ids=str)
def test_small_batches(lengths, version):
    Case(lengths=lengths, dim=64).check(version)


@pytest.mark.gpu
def test_no_request():
    q, cache, table, lengths, _ = Case().make()
    q, none = q[:0], torch.empty(0, *q.shape[1:], dtype=q.dtype, device=DEVICE)
    paged_attention_v1(none, q, cache, table[:0], lengths[:0], scale=1.0)
    paged_attention_v2(none, Workspace.of(0, *q.shape[1:], 2000, DEVICE), q, cache, table[:0], lengths[:0], scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [1, 2])
def test_a_captured_step_follows_its_inputs(version):
    """What a graph replays reads the lengths and blocks of the moment, not of the capture."""
    case = Case()
    q, cache, table, lengths, answer = case.make()
    now, tables = torch.ones_like(lengths), table.clone()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    workspace = Workspace.of(len(q), q.shape[1], case.dim, max(case.lengths), DEVICE)

    def step():
        if version == 1:
            paged_attention_v1(out, q, cache, tables, now, scale=case.dim**-0.5)
        else:
            paged_attention_v2(out, workspace, q, cache, tables, now, scale=case.dim**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    now.copy_(lengths)
    tables.copy_(table)
    graph.replay()
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(out.cpu().double(), answer, rtol=2 * eps, atol=3 * eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("kv_heads, dim", [(1, 64), (8, 128), (3, 80), (16, 256)])
def test_writing_the_cache(dtype, fp8, kv_heads, dim):
    rng = torch.Generator().manual_seed(0)
    qkv = (torch.randn(9, 3 * kv_heads, dim, generator=rng) * 4).to(dtype)
    qkv[0, 0, :4] = torch.tensor([float("inf"), -6e4, 0.0, -0.0])  # FP8 holds what is too large at its range's end
    k, v = qkv[:, :kv_heads], qkv[:, kv_heads : 2 * kv_heads]
    slots = torch.tensor([5, -1, 0, 63, 17, 16, -1, 31, 40])
    cache = torch.randn(2, 4, 16, kv_heads, dim, generator=rng).to(FP8 if fp8 else dtype)
    expected, written = cache.clone(), cache.to(DEVICE)
    scales = dict(k_scale=0.05, v_scale=0.3) if fp8 else {}
    write_kv(expected, k[slots >= 0], v[slots >= 0], slots[slots >= 0], **scales)
    k, v = qkv.to(DEVICE)[:, : 2 * kv_heads].split(kv_heads, dim=1)
    reshape_and_cache(k, v, written, slots.to(DEVICE), **scales)
    assert torch.equal(written.cpu().view(torch.uint8), expected.view(torch.uint8)), "other slots are left alone"


SHAPE = dict(device=DEVICE, dtype=torch.float16, cache_dtype=torch.float16, head_dim=128, block_size=16)


@pytest.mark.parametrize("change, reason", [
    (dict(dtype=torch.float32), "computes in float16 and bfloat16, not in torch.float32"),
    (dict(cache_dtype=torch.bfloat16), "reads a cache of torch.float16 or torch.float8_e4m3fn, not of torch.bfloat16"),
    (dict(head_dim=72), "built for heads of 64, 80, 96, 112, 128, 192, 256, not 72"),
    (dict(block_size=4), "built for blocks of 8, 16, 32, 64 tokens, not 4"),
    (dict(device=torch.device("cpu")), "runs on CUDA, not on cpu"),
    ({}, None),
    (dict(cache_dtype=FP8), None),
])
def test_refusals(monkeypatch, change, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "_missing", lambda library, arch: None)
    assert paged_attention_missing(**{**SHAPE, **change}) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    if reason is None:
        assert paged_attention_missing(**{**SHAPE, **change}) == "needs compute capability 8.0"


def test_refusals_to_write(monkeypatch):
    shape = dict(device=torch.device("cpu"), dtype=torch.float16, cache_dtype=FP8, kv_heads=1, head_dim=128)
    assert reshape_and_cache_missing(**shape) == "runs on CUDA, not on cpu"
    assert "writes 8 values" in reshape_and_cache_missing(**{**shape, "head_dim": 36})
    assert "not torch.float32" in reshape_and_cache_missing(**{**shape, "dtype": torch.float32})


@pytest.mark.parametrize("requests, kv_heads, length, tokens", [
    (1, 8, 512, None), (1, 8, 513, 512), (65, 8, 4096, 1024), (66, 8, 4096, None), (256, 8, 100_000, None),
    (1, 8, 131_072, 512), (16, 8, 131_072, 8192)])
def test_long_sequences_are_split_only_where_devices_would_idle(monkeypatch, requests, kv_heads, length, tokens):
    monkeypatch.setattr(cuda_paged, "multiprocessors", lambda device: 132)
    assert partition_tokens(requests, 4 * kv_heads, kv_heads, length, DEVICE) == tokens


def test_a_workspace_has_a_cell_for_every_partition():
    workspace = Workspace.of(3, 8, 64, 1025, torch.device("cpu"))
    assert [part.shape for part in workspace[:3]] == [(3, 8, 3, 64), (3, 8, 3), (3, 8, 3)]
    assert Workspace.of(3, 8, 64, 1025, torch.device("cpu"), 1024).sums.shape == (3, 8, 2)


@pytest.mark.parametrize("rows, copied", [
    ((256, 64, 1, 0), False), ((384, 64, 1, 128), False), ((264, 66, 1, 0), True), ((256, 1, 4, 0), True),
    ((260, 64, 1, 0), True), ((256, 64, 1, 4), True),
], ids=["dense", "part", "gaps", "transposed", "odd stride", "odd start"])
def test_rows_are_copied_only_when_16_bytes_cannot_be_read(rows, copied):
    strided = torch.randn(2000).half().as_strided((3, 4, 64), rows[:3], rows[3])
    taken = cuda_paged._aligned(strided)
    assert (taken is not strided) is copied and torch.equal(taken, strided)
