"""The sampler: any mix of features against a float64 walk through its order, and against each row alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.sampling import stream_state, uniforms
from nybble.engine.request import SamplingParams
from nybble.engine.sample import to_lists

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STOPS, WORDS = [1, 3], [[2], [0, 4], [4, 4, 1]]
FEATURES = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 3},
    "wide top_k": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {0: 5.0, 4: -100.0, 10**6: 3.0, -1: 3.0}},
    "allowed": {"allowed_token_ids": [0, 1, 4, 10**6, -1]},
    "bad_words": {"bad_words": ["?"]},
    "min_tokens": {"min_tokens": 3},
    "logprobs": {"logprobs": 2},
    "chosen logprob": {"logprobs": 0},
    "all logprobs": {"logprobs": -1},
}


def params_of(features):
    merged = {}
    for name in features:
        merged |= FEATURES[name]
    return SamplingParams(**merged)


@st.composite
def batches(draw_):
    """Vocabulary, logits [S, V] with ties, and per row: features, seed, prompt, outputs."""
    vocab, size = draw_(st.integers(5, 40)), draw_(st.integers(1, 6))
    token = st.integers(0, min(vocab, 8) - 1)
    rows = [
        (draw_(st.sets(st.sampled_from(list(FEATURES)), max_size=6)), draw_(st.integers(-(2**63), 2**64 - 1)),
         draw_(st.lists(token, min_size=1, max_size=6)), draw_(st.lists(token, max_size=5)))
        for _ in range(size)
    ]
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**32)))
    logits = (torch.randn(size, vocab, generator=generator) * 3).mul(4).round().div(4)
    return logits.to(draw_(st.sampled_from(DTYPES))), rows


def rows_of(row_type, rows):
    return [row_type(params=params_of(f), seed=seed, prompt=prompt, outputs=out, stops=STOPS,
                     bad_words=WORDS if "bad_words" in f else []) for f, seed, prompt, out in rows]


def snapshot(output, metadata, i):
    lists = None
    if output.logprobs is not None:
        lists = to_lists(output.logprobs, metadata.num_logprobs)[i]
    return int(output.token_ids[i]), bool(output.invalid[i]), lists


def alone(batch, logits):
    return snapshot(batch.sample(logits[None]), batch.metadata([0]), 0)


@settings(deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_row_in_a_batch_equals_the_row_alone(batch_type, row_type, batch, random):
    logits, specs = batch
    rows = rows_of(row_type, specs)
    places = random.sample(range(8), len(rows))
    together = batch_type(logits.shape[1])
    for place, row in zip(places, rows):
        together.put(place, row)
    before = logits.clone()
    output, metadata = together.sample(logits, places), together.metadata(places)
    assert torch.equal(before, logits), "the logits belong to the caller"
    for i, row in enumerate(rows):
        assert snapshot(output, metadata, i) == alone(batch_type(logits.shape[1], [row]), logits[i])
        assert (metadata.num_logprobs[i] is None) == (row.params.logprobs is None)


def processed(row, logits):
    """Float64 logits after everything that also acts on greedy rows: the documented order, spelled out."""
    p, x = row.params, [float(v) for v in logits]
    if p.allowed_token_ids is not None:
        x = [v if t in p.allowed_token_ids else -INF for t, v in enumerate(x)]
    for *start, last in row.bad_words:
        if row.outputs[len(row.outputs) - len(start) :] == start and len(start) <= len(row.outputs):
            x[last] = -INF
    if len(row.outputs) < p.min_tokens:
        for t in row.stops:
            x[t] = -INF
    for t, bias in (p.logit_bias or {}).items():
        if 0 <= t < len(x):
            x[t] += bias
    for t in range(len(x)):
        times = row.outputs.count(t)
        if times or t in row.prompt:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * times + p.presence_penalty * (times > 0)
    return x


def softmax(x):
    mass = [math.exp(v - max(x)) for v in x]
    return [m / math.fsum(mass) for m in mass]


def distribution(row, x):
    """Final probabilities by definition; None where float32 may fall on the other side of a threshold."""
    p = row.params
    x = [v / p.temperature for v in x]
    probs = softmax(x)
    if any(abs(q - p.min_p * max(probs)) < 1e-5 for q in probs) and p.min_p:
        return None
    x = [v if q >= p.min_p * max(probs) else -INF for v, q in zip(x, probs)]
    if 0 < p.top_k < len(x):
        x = [v if v >= sorted(x)[-p.top_k] - 1e-6 else -INF for v in x]
    probs, mass, keep = softmax(x), 0.0, set()
    for t in sorted(range(len(x)), key=lambda t: (-round(x[t], 5), t)):
        if abs(mass - p.top_p) < 1e-5 and p.top_p < 1:
            return None
        if mass < p.top_p or p.top_p == 1:
            keep.add(t)
        mass += probs[t]
    return softmax([v if t in keep else -INF for t, v in enumerate(x)])


@settings(max_examples=300, deadline=None)
@given(batches())
def test_tokens_follow_the_documented_order(batch_type, row_type, batch):
    logits, specs = batch
    rows = rows_of(row_type, specs)
    output = batch_type(logits.shape[1], rows).sample(logits)
    answers = zip(output.token_ids.tolist(), output.invalid.tolist())
    for row, values, (token, invalid) in zip(rows, logits.tolist(), answers):
        x = processed(row, values)
        assert invalid == (max(x) == -INF)
        if invalid:
            assert token == 0
        elif row.params.is_greedy:
            assert x[token] > max(x) - 1e-4
        elif (probs := distribution(row, x)) is not None:
            u = uniforms(np.array([stream_state(row.seed)], np.uint64), np.array([len(row.outputs)]))[0]
            below = math.fsum(probs[:token])
            assert probs[token] > 0
            assert below - 1e-5 <= u <= below + probs[token] + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("params, reached", [
    ({"temperature": 0.0}, [{1}, {2}, {0}]),
    ({"top_p": 1e-9}, [{1}, {2}, {0}]),
    ({"top_k": 1}, [{1, 2}, {2, 3}, {0, 1, 2, 3}]),
    ({"min_p": 1.0}, [{1, 2}, {2, 3}, {0, 1, 2, 3}]),
    ({"temperature": 1e-4}, [{1, 2}, {2, 3}, {0, 1, 2, 3}]),
], ids=str)
def test_ties_of_the_likeliest(batch_type, row_type, params, reached, dtype):
    """Greedy takes the lowest index; top_k=1 and min_p=1 keep every tie; the nucleus is cut by index."""
    logits = torch.tensor([[1, 5, 5, 0], [-INF, -INF, -3, -3], [2, 2, 2, 2]], dtype=dtype)
    for row, tokens in zip(logits, reached):
        rows = [row_type(params=SamplingParams(**params), seed=s) for s in range(50)]
        assert set(batch_type(4, rows, max_rows=50).sample(row.expand(50, 4)).token_ids.tolist()) == tokens


@pytest.mark.parametrize("features", [["greedy"], ["hot"], ["top_p", "min_p"],
                                      ["hot", "presence", "bias", "logprobs"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusable_rows_are_marked_and_disturb_nobody(batch_type, row_type, features, dtype):
    nan = float("nan")
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    spoiled = logits.clone()
    spoiled[1, 4], spoiled[2], spoiled[3, 8], spoiled[4], spoiled[5, 1:] = nan, nan, INF, -INF, -INF
    rows = [row_type(params=params_of(features), seed=s) for s in range(6)]
    good, got = batch_type(9, rows).sample(logits), batch_type(9, rows).sample(spoiled)
    assert not good.invalid.any()
    assert got.invalid.tolist() == [False, True, True, True, True, False]
    assert got.token_ids.tolist() == [good.token_ids[0], 0, 0, 0, 0, 0]
    if got.logprobs is not None:
        assert torch.equal(got.logprobs.logprobs[0], good.logprobs.logprobs[0])


def test_a_mask_hides_no_nan_and_a_masked_out_row_is_unusable(batch_type, row_type):
    logits = torch.zeros(3, 4)
    logits[0, 3] = float("nan")
    only_first = SamplingParams(allowed_token_ids=[0])
    nothing = SamplingParams(allowed_token_ids=[0], min_tokens=1)
    rows = [row_type(params=p, stops=[0]) for p in (only_first, nothing, only_first)]
    assert batch_type(4, rows).sample(logits).invalid.tolist() == [True, True, False]


def test_logprobs_are_of_the_logits_as_they_came(batch_type, row_type):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1))
    every = params_of(["hot", "bias", "allowed", "repetition", "top_p", "all logprobs"])
    output = batch_type(9, [row_type(params=every)]).sample(logits)
    want = logits[0].log_softmax(-1)
    assert torch.equal(output.logprobs.logprobs[0], want[output.logprobs.token_ids[0]])
    assert output.logprobs.token_ids[0, 0] == output.token_ids[0]


def test_no_rows(batch_type):
    output = batch_type(4).sample(torch.zeros(0, 4), [])
    assert output.token_ids.shape == output.invalid.shape == (0,)


def test_extreme_logits_do_not_overflow(batch_type, row_type):
    logits = torch.tensor([[3e38, -3e38, 3e38, 0.0], [-3e38, -3.1e38, -INF, -3.2e38]])
    rows = [row_type(params=SamplingParams(temperature=1e-5), seed=s) for s in range(2)]
    output = batch_type(4, rows).sample(logits)
    assert not output.invalid.any()
    assert output.token_ids[0] in (0, 2) and output.token_ids[1] == 0


@pytest.mark.parametrize("params, keep", [
    ({}, range(12)),
    ({"temperature": 0.5}, range(12)),
    ({"top_k": 4}, range(4)),
    ({"top_p": 0.75}, range(5)),
    ({"min_p": 0.2}, range(6)),
    ({"temperature": 2.0, "top_k": 9, "top_p": 0.85, "min_p": 0.1}, range(7)),
], ids=str)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_frequencies(batch_type, row_type, params, keep, by):
    """Chi-square of 6000 draws over seeds, or positions of one seed; `keep` is the support, found by hand."""
    vocab, draws, size = 12, 6000, 250
    logits = -0.3 * torch.arange(vocab, dtype=torch.float32)
    params = SamplingParams(**params)
    counts = np.zeros(vocab)
    for start in range(0, draws, size):
        seeds = range(start, start + size) if by == "seed" else [99] * size
        rows = [row_type(params=params, seed=seed) for seed in seeds]
        batch = batch_type(vocab, rows, max_rows=size)
        if by == "position":
            batch.num_tokens += np.arange(start, start + size)
        counts += np.bincount(batch.sample(logits.expand(size, vocab)).token_ids, minlength=vocab)
    weights = np.array([math.exp(-0.3 * t / params.temperature) * (t in keep) for t in range(vocab)])
    expected = draws * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi2, freedom = ((counts - expected)[used] ** 2 / expected[used]).sum(), used.sum() - 1
    # Wilson-Hilferty: exceeded with probability 1e-4
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_large_vocabulary_batched_equals_alone(batch_type, row_type):
    """Widths at which vectorised and parallel kernels take other paths than at 40."""
    for vocab in (1031, 32003):
        logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
        mix = [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.95}, {"min_p": 0.05}, {"temperature": 0.0},
               {"temperature": 0.6, "logprobs": 3}, {"repetition_penalty": 1.2}, {"top_k": 7}]
        rows = [row_type(params=SamplingParams(**p), seed=i, prompt=[1, 2, 3]) for i, p in enumerate(mix)]
        together = batch_type(vocab, rows)
        output, metadata = together.sample(logits), together.metadata(range(8))
        for i, row in enumerate(rows):
            assert snapshot(output, metadata, i) == alone(batch_type(vocab, [row]), logits[i])


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_rows_stay_independent(batch_type, row_type):
    device, vocab = torch.device("cuda"), 32003
    logits = torch.randn(len(FEATURES), vocab, device=device) * 2
    rows = rows_of(row_type, [({name}, i, [0, 1, 2], [4, 4]) for i, name in enumerate(FEATURES)])
    batch_type(vocab, rows, max_rows=32, device=device).sample(logits)  # first use sets libraries up
    together = batch_type(vocab, rows, max_rows=32, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        together.metadata(range(len(rows)))
        output = together.sample(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    metadata = together.metadata(range(len(rows)))
    for i, row in enumerate(rows):
        assert snapshot(output, metadata, i) == alone(batch_type(vocab, [row], device=device), logits[i])
