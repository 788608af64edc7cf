"""The compiled kernel for attention of prompts against float64 over ragged batches whose unseen slots are poisoned."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.attention import attend_paged, paged
from nybble.csrc.attention.prompt import prompt_attention_missing, prompt_attention_op
from tests.csrc.attention.ragged import DEVICE, close, expected, paged_case

# Queries and keys of requests: alone, over prefixes, at the edges of tiles and pages, and without queries or keys.
MIXED = [(1, 1), (130, 130), (17, 200), (0, 3), (1, 300), (300, 700), (1, 0), (64, 64), (129, 513), (3, 128),
         (128, 256)]
PROBLEM = dict(device=torch.device("cuda"), dtype=torch.bfloat16, cache_dtype=torch.bfloat16, head_dim=128,
               block_size=16, group=4, window=None)
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture
def prompt_attention(monkeypatch):
    """Skips where the kernel cannot be had; Triton's is out of reach."""
    if (reason := prompt_attention_missing(**PROBLEM)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(paged, "_launch", None)


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, width, page", [
    (8, 2, 128, 16), (4, 4, 128, 64), (7, 1, 64, 16), (16, 2, 64, 8), (28, 4, 128, 32), (32, 1, 128, 128),
    (3, 1, 64, 128), (128, 1, 64, 16)])
def test_ragged_batches(dtype, heads, kv_heads, width, page):
    batch, q, cache, keys, values = paged_case(MIXED, heads, kv_heads, width, page, dtype)
    found = attend_paged(q, cache, batch, scale=width**-0.5)
    close(found, expected(MIXED, q, keys, values, width**-0.5), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
@pytest.mark.parametrize("queries, length", [(n, m) for n in (33, 127, 128, 129, 1000) for m in (n, n + 1, n + 1000)])
def test_every_edge_of_one_prompt(queries, length):
    lens = [(queries, length)]
    batch, q, cache, keys, values = paged_case(lens, 4, 1, 128, 16, torch.bfloat16)
    close(attend_paged(q, cache, batch, scale=0.1), expected(lens, q, keys, values, 0.1), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
def test_padding_of_many_rows():
    """Rows that see no key get zeros, whole tiles of them too."""
    lens = [(1000, 0), (40, 40), (700, 300), (1, 0)]
    batch, q, cache, keys, values = paged_case(lens, 4, 1, 128, 16, torch.bfloat16)
    close(attend_paged(q, cache, batch, scale=0.1), expected(lens, q, keys, values, 0.1), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
@pytest.mark.parametrize("lens, taken", [([(20, 5000)], False), ([(33, 5000)], True), ([(20, 600)] * 140, True),
                                         ([(16, 600)] * 140, False)])
def test_few_queries_are_left_to_splits_of_the_keys(lens, taken, monkeypatch):
    """Four heads to one of the cache: a program has 128 rows."""
    batch, q, cache, *_ = paged_case(lens, 4, 1, 64, 16, torch.bfloat16)
    asked = []
    monkeypatch.setattr(paged, "_launch", lambda *_, **__: asked.append("triton"))
    attend_paged(q, cache, batch, scale=0.1)
    assert (not asked) == taken


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
def test_more_jobs_than_the_device_has_multiprocessors():
    """Blocks take several jobs, some without tiles of keys, and their barriers come round."""
    lens = [(70 + 13 * (i % 7), 70 + 13 * (i % 7) + 150 * (i % 5)) for i in range(60)] + [(1, 0)] * 5
    batch, q, cache, keys, values = paged_case(lens, 16, 8, 64, 16, torch.bfloat16)
    found = [attend_paged(q, cache, batch, scale=0.125) for _ in range(20)]
    close(found[0], expected(lens, q, keys, values, 0.125), torch.bfloat16)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
def test_queries_within_wider_rows_and_scales():
    """As they lie in the product of qkv; scales of the cache are taken into the scores and the result."""
    batch, q, cache, keys, values = paged_case(MIXED, 8, 2, 128, 16, torch.bfloat16)
    wide = torch.full((len(q), 12, 128), float("nan"), dtype=q.dtype, device=DEVICE)
    wide[:, :8] = q
    found = attend_paged(wide[:, :8], cache, batch, scale=0.1, k_scale=0.5, v_scale=2.0)
    wanted = expected(MIXED, q, [0.5 * k for k in keys], [2.0 * v for v in values], 0.1)
    close(found / 2, wanted / 2, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("prompt_attention")
def test_one_request_with_nan_ends_alone():
    batch, q, cache, *_ = paged_case(MIXED, 8, 2, 128, 16, torch.bfloat16)
    clean = attend_paged(q, cache, batch, scale=0.1)
    start, stop = batch.query_start[5], batch.query_start[6]
    q[start:stop] = float("nan")
    found = attend_paged(q, cache, batch, scale=0.1)
    assert found[start:stop].isnan().all()
    assert torch.equal(found[:start], clean[:start]) and torch.equal(found[stop:], clean[stop:])


@pytest.mark.parametrize("change, reason", [
    (dict(dtype=torch.float32), "not in torch.float32"), (dict(cache_dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
    (dict(head_dim=96), "96"), (dict(block_size=4), "4"), (dict(block_size=256), "256"), (dict(group=129), "129"),
    (dict(window=64), "window"), (dict(device=torch.device("cpu")), "not on cpu")])
def test_what_it_does_not_take(change, reason):
    assert reason in prompt_attention_missing(**PROBLEM | change)


def test_rows_that_are_not_aligned_are_left_to_others():
    cache = torch.zeros(2, 4, 16, 1, 64, dtype=torch.bfloat16)
    q = torch.zeros(65, 4, 72, dtype=torch.bfloat16)
    assert prompt_attention_op(q[..., 1:65], cache, None) is None
