"""The flash backend over the libraries themselves, where one is installed, against float64: prompts, chunks over a
prefix, decoding, captured decoding, and steps that the host plans ahead."""

from __future__ import annotations

import random
from itertools import accumulate

import numpy as np
import pytest
import torch

from nybble import LLM, SamplingParams
from nybble.csrc.attention import write_kv
from nybble.engine.attention import flash
from nybble.engine.attention.base import AttentionProblem, StepShape
from nybble.engine.attention.flash import FlashAttentionBackend
from nybble.engine.plan import KVCacheLayout
from nybble.models import Attention

# FlashInfer compiles a kernel, ten files, when it first meets one. Here are bfloat16 heads of 128, with and without a
# window, float16 heads of 64, and those of older GPUs: keep it at four.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
DEVICE = torch.device("cuda")
KINDS = {"bf16-128": (torch.bfloat16, 128, None), "window": (torch.bfloat16, 128, 37),
         "fp16-64": (torch.float16, 64, None)}
# Queries and keys of requests.
STEPS = {
    "prompts": [(5, 5), (130, 130), (1, 1), (300, 300)],
    "chunks": [(17, 200), (64, 1000), (129, 4100)],
    "mixed": [(1, 1), (40, 40), (1, 65), (200, 263), (1, 3000), (5, 63), (2, 2)],
    "decode": [(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 200, 3000)],
}


def needs(kind, *, heads=8, kv_heads=2, page=16):
    """Skip where no library can."""
    dtype, width, window = KINDS[kind]
    problem = AttentionProblem(device=DEVICE, dtype=dtype, cache_dtype=dtype, head_dim=width, num_heads=heads,
                               num_kv_heads=kv_heads, kv_lora_rank=None, sliding_window=window, block_size=page)
    if reason := FlashAttentionBackend.supports(problem):
        pytest.skip(reason)


@pytest.fixture(params=flash.LIBRARIES, ids=[library.name for library in flash.LIBRARIES])
def library(request, monkeypatch):
    """The only one that there is."""
    monkeypatch.setattr(flash, "LIBRARIES", (request.param,))
    return request.param


class Case:
    """A backend of some layers, a cache that holds NaN wherever nothing was written, and one step over it."""

    def __init__(self, lens, kind, *, heads=8, kv_heads=2, page=16, layers=1, seed=0) -> None:
        needs(kind, heads=heads, kv_heads=kv_heads, page=page)
        dtype, width, window = KINDS[kind]
        self.lens, self.window, self.dtype, self.page = lens, window, dtype, page
        self.layers = [Attention(i, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, sliding_window=window)
                       for i in range(layers)]
        self.rng = torch.Generator().manual_seed(seed)
        blocks = [-(-keys // page) for _, keys in lens]
        order = (torch.randperm(sum(blocks), generator=self.rng) + 1).int().split(blocks)
        self.table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=2**30)
        layout = KVCacheLayout(num_blocks=sum(blocks) + 1, block_size=page, groups=[])
        self.backend = FlashAttentionBackend(self.layers, layout, dtype=dtype, device=DEVICE)
        slots = [row[torch.arange(keys) // page].long() * page + torch.arange(keys) % page
                 for row, (_, keys) in zip(self.table, lens)]
        self.slots = torch.cat([at[len(at) - queries :] for at, (queries, _) in zip(slots, lens)]).to(DEVICE)
        self.k, self.v = ([self.random(keys, kv_heads, width) for _, keys in lens] for _ in "kv")
        self.q = self.random(sum(queries for queries, _ in lens), heads, width)
        for cache in self.backend.caches:
            cache.fill_(float("nan"))
            for at, k, v, (queries, keys) in zip(slots, self.k, self.v, lens):
                old = slice(keys - queries)
                write_kv(cache, k[old], v[old], at[old].to(DEVICE))

    def random(self, *shape):
        return torch.randn(shape, generator=self.rng).to(DEVICE, self.dtype)

    def step(self) -> StepShape:
        queries, keys = (np.array(column, np.int32) for column in zip(*self.lens))
        starts = torch.tensor([0, *accumulate(queries.tolist())], dtype=torch.int32)
        return StepShape(query_lens=queries, seq_lens=keys, block_table=self.table.to(DEVICE),
                         host_block_table=self.table.numpy(), slots=self.slots, query_start=starts.to(DEVICE),
                         device_seq_lens=torch.from_numpy(keys).to(DEVICE), max_query_len=int(queries.max()))

    def new(self):
        """What the step computes: its keys and values."""
        return (torch.cat([x[-queries:] for x, (queries, _) in zip(xs, self.lens)]) for xs in (self.k, self.v))

    def expected(self):
        """float64; a request without keys gets zeros."""
        out, at = [], 0
        for (queries, length), k, v in zip(self.lens, self.k, self.v):
            mine, at = self.q[at : at + queries].double(), at + queries
            k, v = (x.double().repeat_interleave(mine.shape[1] // x.shape[1], 1) for x in (k, v))
            position = torch.arange(length - queries, length, device=DEVICE)[:, None]
            key = torch.arange(length, device=DEVICE)
            hidden = (key > position) | (key <= position - (self.window or 2**30))
            scores = torch.einsum("qhd,khd->hqk", mine, k) * mine.shape[-1] ** -0.5
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(out)

    def close(self, found):
        """The bound of our own kernels (tests/csrc/attention): a probability is rounded, and so is their sum."""
        assert found.dtype == self.dtype and found.isfinite().all()
        eps = torch.finfo(self.dtype).eps
        torch.testing.assert_close(found.double(), self.expected(), rtol=2 * eps, atol=4 * eps)

    def check(self):
        run = self.backend.prepare(self.step())
        for layer in self.layers:
            self.close(run.run(layer, self.q, *self.new()))


@pytest.mark.parametrize("heads, kv_heads, page", [(8, 2, 16), (16, 2, 64), (32, 2, 16), (3, 3, 64), (8, 1, 256)])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(library, kind, step, heads, kv_heads, page):
    Case(STEPS[step], kind, heads=heads, kv_heads=kv_heads, page=page, layers=2).check()


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (32, 2)])
@pytest.mark.parametrize("step", STEPS)
def test_the_kernels_of_older_gpus(monkeypatch, step, heads, kv_heads):
    """They split keys, into a workspace of the size that we work out: few requests of many keys need the most."""
    monkeypatch.setattr(flash, "HOPPER", (0, 0))
    monkeypatch.setattr(flash, "LIBRARIES", (flash.FlashInfer,))
    Case(STEPS[step], "bf16-128", heads=heads, kv_heads=kv_heads).check()


def test_a_step_planned_while_the_one_before_runs(library):
    """Nothing waits for the device but a plan for the copy of the last, and that is not overwritten."""
    first, second = Case(STEPS["chunks"], "bf16-128", page=256, layers=2), Case(STEPS["mixed"], "bf16-128", page=256)
    second.backend.libraries = first.backend.libraries
    for case in (first, second):  # compiled, workspaces made
        case.check()
    steps = [(case, case.step(), list(case.new())) for case in (first, second)]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [case.backend.prepare(step).run(case.layers[0], case.q, *new) for case, step, new in steps]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for case, out in zip((first, second), found):
        case.close(out)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_decoding_is_what_it_is_at_once(library, kind):
    """Recorded over nobody's requests, as the engine does, and replayed over some, with rows to spare."""
    case, spare = Case(STEPS["decode"], kind, page=256), 3
    step = case.step()
    q, k, v = (torch.cat((x, torch.zeros_like(x[:spare]))) for x in (case.q, *case.new()))
    rows, count = len(q), len(case.lens)
    ones, zeros = np.ones(rows, np.int32), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    shape = StepShape(query_lens=ones, seq_lens=ones, block_table=zeros[:, None].repeat(1, case.table.shape[1]),
                      host_block_table=np.zeros((rows, 1), np.int32), slots=zeros.long(), device_seq_lens=zeros,
                      query_start=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE), max_query_len=1)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.backend.prepare(shape).run(case.layers[0], q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = case.backend.prepare(shape).run(case.layers[0], q, k, v)
    shape.device_seq_lens[:count], shape.block_table[:count] = step.device_seq_lens, step.block_table
    shape.slots[:count] = step.slots
    graph.replay()
    replayed = out.clone()
    case.close(replayed[:count])
    assert not replayed[count:].any()
    assert replayed.equal(case.backend.prepare(shape).run(case.layers[0], q, k, v))


def test_the_engine_gives_the_tokens_of_triton(make_checkpoint):
    """Prompts, chunks of them, a prefix that is found again, and captured decoding."""
    rng = random.Random(3)
    prefix = [rng.randrange(5, 261) for _ in range(32)]
    prompts = [[*prefix, *(rng.randrange(5, 261) for _ in range(n))] for n in (1, 9, 40, 90)]
    needs("fp16-64")
    model = make_checkpoint("Llama", head_dim=64)
    results = []
    for backend in ("triton", "flash"):
        llm = LLM(str(model), use_tqdm_on_load=False, device="cuda", dtype="float16", num_gpu_blocks_override=64,
                  max_num_batched_tokens=48, attention_backend=backend)
        out = [output.outputs[0] for output in llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1), use_tqdm=False)]
        llm.shutdown()
        results.append(([o.token_ids for o in out], [o.cumulative_logprob for o in out]))
    (wanted, logprobs), (found, theirs) = results
    assert found == wanted
    assert theirs == pytest.approx(logprobs, abs=0.05)
