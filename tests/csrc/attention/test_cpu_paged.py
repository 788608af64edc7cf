"""The CPU's attention kernels against float64: ragged batches, odd sizes, windows, parts, threads, unwritten slots."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.attention import HeadNorms, Ragged, rope_and_cache_reference, write_kv
from nybble.csrc.attention.cpu_paged import (
    attend_paged_cpu,
    cpu_attention_missing,
    rope_and_cache_cpu,
    store_kv_cpu,
)
from nybble.csrc.ops import op_missing

CPU = torch.device("cpu")
# (queries, keys): a prompt, a chunk after a prefix, decoding, the shortest, a row that pads, more than a part
REQUESTS = ((37, 37), (5, 70), (1, 130), (1, 1), (1, 0), (3, 600), (66, 66))
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

pytestmark = pytest.mark.skipif(op_missing("cpu_attention", CPU) is not None,
                                reason=str(op_missing("cpu_attention", CPU)))


@pytest.fixture
def threads():
    """Set torch's threads, and put them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def batch_of(requests, *, heads, kv_heads, dim, block=16, dtype=torch.float32, seed=0):
    """(q, cache, batch): blocks in no order, NaN wherever no request has written."""
    g = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block) for _, length in requests]
    order = torch.randperm(sum(blocks) + 3, generator=g).int()
    table = torch.zeros(len(requests), max(blocks) + 1, dtype=torch.int32)
    cache = torch.full((2, len(order), block, kv_heads, dim), float("nan"), dtype=dtype)
    for i, ((_, length), count) in enumerate(zip(requests, blocks)):
        table[i, :count] = order[sum(blocks[:i]):][:count]
        slots = torch.arange(length)
        slots = table[i, slots // block].long() * block + slots % block
        write_kv(cache, *(torch.randn(length, kv_heads, dim, generator=g).to(dtype) for _ in range(2)), slots)
    queries = torch.tensor([0, *(count for count, _ in requests)])
    q = torch.randn(int(queries.sum()), heads, dim, generator=g).to(dtype)
    return q, cache, Ragged(query_start=queries.cumsum(0).int(), max_query_len=int(queries.max()), block_table=table,
                            seq_lens=torch.tensor([length for _, length in requests]).int())


def exact(q, cache, batch, scale, window=None):
    """Attention in float64, one query at a time."""
    block, group = cache.shape[2], q.shape[1] // cache.shape[3]
    out = torch.zeros(q.shape, dtype=torch.float64)
    starts = batch.query_start.tolist()
    for i, length in enumerate(batch.seq_lens.tolist()):
        slots = torch.arange(length)
        slots = batch.block_table[i, slots // block].long() * block + slots % block
        k, v = cache.flatten(1, 2)[:, slots].double().repeat_interleave(group, dim=2)
        for row in range(starts[i], starts[i + 1]) if length else ():
            end = length - (starts[i + 1] - row) + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            weights = torch.einsum("hd,khd->hk", q[row].double(), k[seen]).mul(scale).softmax(-1)
            out[row] = torch.einsum("hk,khd->hd", weights, v[seen])
    return out


def check(found, wanted, dtype):
    assert found.dtype == dtype and found.isfinite().all()
    assert (found.double() - wanted).abs().max() <= BOUND[dtype] * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim, block, window", [
    (8, 4, 64, 16, None), (4, 4, 80, 8, None), (8, 1, 96, 32, 50), (5, 1, 128, 16, None), (6, 2, 64, 3, 1),
    (7, 1, 10, 16, 9), (2, 1, 256, 16, 520), (64, 1, 8, 16, None)])
def test_against_float64(heads, kv_heads, dim, block, window, dtype):
    q, cache, batch = batch_of(REQUESTS, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype)
    found = attend_paged_cpu(q, cache, batch, scale=dim**-0.5, window=window)
    check(found, exact(q, cache, batch, dim**-0.5, window), dtype)


@pytest.mark.parametrize("window", [None, 530])
def test_nothing_else_changes_a_bit(window, threads):
    """Threads, with few requests split by parts; neighbours; how many tokens a request computes in a step."""
    shape = dict(heads=4, kv_heads=2, dim=64)
    q, cache, batch = batch_of(((700, 700), (1, 1400), (2, 40)), **shape)
    whole = attend_paged_cpu(q, cache, batch, scale=0.1, window=window)
    for count in (2, 5):
        threads(count)
        assert torch.equal(attend_paged_cpu(q, cache, batch, scale=0.1, window=window), whole)
    for i, (start, end) in enumerate(((0, 700), (700, 701), (701, 703))):
        for cut in {start, end - 1, (start + end) // 2}:  # the last tokens alone, the others in a step before
            for count in (1, 4):
                threads(count)
                alone = Ragged(query_start=torch.tensor([0, end - cut]).int(), seq_lens=batch.seq_lens[i : i + 1],
                               block_table=batch.block_table[i : i + 1], max_query_len=end - cut)
                found = attend_paged_cpu(q[cut:end], cache, alone, scale=0.1, window=window)
                assert torch.equal(found, whole[cut:end]), (i, cut, count)


def test_what_is_not_finite_is_seen_by_those_who_see_it():
    q, cache, batch = batch_of(((3, 3), (1, 5)), heads=2, kv_heads=1, dim=64)
    q[3] = float("nan")
    out = attend_paged_cpu(q, cache, batch, scale=1.0)
    assert out[3].isnan().all() and out[:3].isfinite().all()
    q, cache, batch = batch_of(((3, 3), (1, 5)), heads=2, kv_heads=1, dim=64)
    block, offset = int(batch.block_table[1, 0]), 2
    cache[0, block, offset, 0, 7] = float("nan")
    out = attend_paged_cpu(q, cache, batch, scale=1.0)
    assert out[3].isnan().all() and out[:3].isfinite().all()


def test_scores_far_apart():
    """No overflow where scores are huge, and the sum of a whole prompt's equal weights is right."""
    q, cache, batch = batch_of(((1, 100), (1, 1000)), heads=1, kv_heads=1, dim=16)
    check(attend_paged_cpu(q, cache, batch, scale=1e4), exact(q, cache, batch, 1e4), torch.float32)
    check(attend_paged_cpu(q, cache, batch, scale=0.0), exact(q, cache, batch, 0.0), torch.float32)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (3, 1, 20), (2, 2, 96)])
def test_rope_and_cache(heads, kv_heads, dim, norm, dtype):
    g = torch.Generator().manual_seed(1)
    tokens, total = 9, (heads + 2 * kv_heads) * dim
    qkv = torch.randn(tokens, total + 8, generator=g).to(dtype)[:, :total]
    angles = torch.randn(tokens, 1, dim // 2, generator=g)
    cos, sin = (torch.cat(halves, -1).to(dtype) for halves in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    norms = HeadNorms(*(torch.rand(dim, generator=g).to(dtype) + 0.5 for _ in range(2)), 1e-5) if norm else None
    slots = torch.tensor([5, 0, 17, 3, -1, 30, 31, 8, 9])
    cache = torch.zeros(2, 4, 8, kv_heads, dim, dtype=dtype)
    found = rope_and_cache_cpu(qkv, cos, sin, cache, slots, heads=heads, norms=norms)
    wanted_cache = cache.double().zero_()
    wide = norms and HeadNorms(norms.query.double(), norms.key.double(), norms.eps)
    wanted = rope_and_cache_reference(qkv.double(), cos.double(), sin.double(), wanted_cache, slots, heads=heads,
                                      norms=wide)
    check(found, wanted, dtype)
    check(cache, wanted_cache, dtype)


def test_store():
    cache = torch.zeros(2, 2, 8, 3, 16)
    k, v = torch.randn(2, 4, 3, 16)
    slots = torch.tensor([3, -1, 15, 0])
    store_kv_cpu(cache, k, v, slots)
    wanted = torch.zeros_like(cache)
    write_kv(wanted, k[slots >= 0], v[slots >= 0], slots[slots >= 0])
    assert torch.equal(cache, wanted)


def problem(**changes):
    return {**dict(device=CPU, dtype=torch.float32, cache_dtype=torch.float32, head_dim=64, group=2), **changes}


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"device": torch.device("cuda")}, "runs on CPU, not on cuda"),
    ({"dtype": torch.float64}, "computes in 16 or 32 bits, not in float64"),
    ({"cache_dtype": torch.float8_e4m3fn}, "reads a cache of the model's float32, not of float8_e4m3fn"),
    ({"head_dim": 33}, "head_dim 33 has no halves to rotate"), ({"group": 65}, "65 query heads of one KV head > 64")])
def test_what_it_refuses(changes, reason):
    assert cpu_attention_missing(**problem(**changes)) == reason


def test_what_does_not_fit_is_refused_by_the_op():
    q, cache, batch = batch_of(((2, 20),), heads=2, kv_heads=1, dim=16)
    long = Ragged(query_start=batch.query_start, seq_lens=batch.seq_lens + 100, block_table=batch.block_table,
                  max_query_len=2)
    with pytest.raises(RuntimeError, match="request 0 has 2 queries and 120 keys in 3 blocks"):
        attend_paged_cpu(q, cache, long, scale=1.0)
    with pytest.raises(RuntimeError, match="of the values' dtype"):
        attend_paged_cpu(q, cache.bfloat16(), batch, scale=1.0)


def decoding(values, keys=3):
    """(q, cache, batch) of requests with one query each over some keys of ones, their values all `values[i]`."""
    count = len(values)
    cache = torch.ones(2, count * keys, 1, 1, 8)
    cache[1] = torch.tensor(values).repeat_interleave(keys)[:, None, None, None]
    batch = Ragged(query_start=torch.arange(count + 1).int(), seq_lens=torch.full((count,), keys).int(),
                   block_table=torch.arange(count * keys).int().view(count, keys), max_query_len=1)
    return torch.ones(count, 1, 8), cache, batch


@pytest.mark.parametrize("keys", [3, 1200], ids=["whole", "in parts"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_row_that_sees_no_number_takes_nothing_of_its_neighbours(threads, number, keys):
    """All of its scores are minus infinity: 0 / 0, and not what the memory held of another request."""
    threads(number)
    values = [float(i) for i in range(40 if keys == 3 else 2)]
    q, cache, batch = decoding(values, keys)
    victim = len(values) // 2
    q[victim], cache[0, victim * keys : (victim + 1) * keys] = float("inf"), -1.0
    found = attend_paged_cpu(q, cache, batch, scale=1.0)
    assert found[victim].isnan().all()
    others = [i for i in range(len(values)) if i != victim]
    assert torch.allclose(found[others, 0, 0], torch.tensor(values)[others])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_values_that_are_no_numbers_stay_with_the_tokens_that_see_them(window, odd):
    """A prompt's rows before such a value are those of a prompt without it, bit for bit."""
    q, cache, batch = batch_of([(20, 20), (6, 6)], heads=4, kv_heads=2, dim=24)
    clean = attend_paged_cpu(q, cache, batch, scale=0.2, window=window)
    slot = batch.block_table[0, 9 // 16] * 16 + 9 % 16
    cache.flatten(1, 2)[1, slot] = odd
    found = attend_paged_cpu(q, cache, batch, scale=0.2, window=window)
    sees = torch.tensor([9 <= i < 9 + (window or 20) and i < 20 for i in range(26)])
    assert torch.equal(found[~sees], clean[~sees]) and not found[sees].isfinite().any()
