"""Each sampling op against a slow and obvious one, and its promises at the edges."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.sampling import apply_min_p, apply_penalties, apply_top_k_top_p, draw, likeliest

INF = float("inf")
LAST_U = 1 - 2**-53
finite = st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float)  # the integers bring ties


@st.composite
def logits_rows(draw_, max_rows=4, max_vocab=40):
    """[R, V] logits with ties and -inf; every row keeps a finite entry."""
    rows, vocab = draw_(st.integers(1, max_rows)), draw_(st.integers(1, max_vocab))
    values = draw_(st.lists(finite | st.just(-INF), min_size=rows * vocab, max_size=rows * vocab))
    logits = torch.tensor(values, dtype=torch.float32).view(rows, vocab)
    logits[:, draw_(st.integers(0, vocab - 1))] = draw_(finite)
    return logits


def softmax64(row):
    peak = max(row)
    mass = [math.exp(x - peak) for x in row]
    return [m / sum(mass) for m in mass]


def kept(logits):
    return [[i for i, x in enumerate(row) if x > -INF] for row in logits.tolist()]


def per_row(logits, strategy, data, dtype):
    rows = len(logits)
    return torch.tensor(data.draw(st.lists(strategy, min_size=rows, max_size=rows)), dtype=dtype)


@pytest.mark.parametrize("vocab", [1, 33, 64, 96, 1000, 1024])  # no tiles; one; several, of 32 to 256 columns
def test_likeliest_is_the_first_maximum(vocab):
    rows = torch.randint(-3, 4, (9, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    rows[3], rows[4, -1], rows[5, vocab // 2] = -INF, INF, float("nan")
    peak, token = likeliest(rows)
    torch.testing.assert_close(peak, torch.from_numpy(rows.numpy().max(axis=1)), equal_nan=True, rtol=0, atol=0)
    assert token.tolist() == rows.numpy().argmax(axis=1).tolist()


@settings(deadline=None)
@given(logits_rows(), st.data())
def test_penalties(logits, data):
    rows, vocab = logits.shape
    tokens = st.lists(st.integers(0, vocab - 1), max_size=8)
    prompts, outputs = ([data.draw(tokens) for _ in range(rows)] for _ in range(2))
    repetition = per_row(logits, st.sampled_from([1.0, 0.5, 1.3, 2.0]), data, torch.float32)
    presence, frequency = (per_row(logits, st.sampled_from([0.0, -2.0, 0.7, 2.0]), data, torch.float32)
                           for _ in range(2))
    counts = torch.tensor([[out.count(t) for t in range(vocab)] for out in outputs], dtype=torch.int32)
    mask = torch.tensor([[t in prompt for t in range(vocab)] for prompt in prompts])
    got = apply_penalties(logits.clone(), prompt_mask=mask, output_counts=counts, repetition=repetition,
                          presence=presence, frequency=frequency)
    for i in range(rows):
        times, r = Counter(outputs[i]), float(repetition[i])
        for t, x in enumerate(logits[i].tolist()):
            if t in times or t in prompts[i]:
                x = x / r if x > 0 else x * r
            want = x - float(frequency[i]) * times[t] - float(presence[i]) * (t in times)
            assert float(got[i, t]) == pytest.approx(want, rel=1e-6, abs=1e-5)
        if (float(repetition[i]), float(presence[i]), float(frequency[i])) == (1, 0, 0):
            assert torch.equal(got[i], logits[i])


@settings(deadline=None)
@given(logits_rows(), st.data())
def test_min_p(logits, data):
    min_p = per_row(logits, st.sampled_from([0.0, 0.01, 0.3, 1.0]), data, torch.float32)
    got = apply_min_p(logits.clone(), min_p)
    for row, out, least in zip(logits.tolist(), got.tolist(), min_p.tolist()):
        probs = softmax64(row)
        for x, y, p in zip(row, out, probs):
            assert y in (x, -INF)
            if abs(p - least * max(probs)) > 1e-6 * max(probs):
                assert (y == -INF) == (p < least * max(probs) or x == -INF)
        assert out[row.index(max(row))] == max(row)
        assert least > 0 or out == row


@settings(deadline=None)
@given(logits_rows(), st.data())
def test_top_k_keeps_ties_at_the_boundary(logits, data):
    vocab = logits.shape[1]
    k = per_row(logits, st.integers(-1, vocab + 2), data, torch.int64)
    got = apply_top_k_top_p(logits.clone(), k, None)
    for row, out, n in zip(logits.tolist(), got.tolist(), k.tolist()):
        least = sorted(row)[-n] if 0 < n < vocab else -INF
        assert out == [x if x >= least else -INF for x in row]
    on = [n for n in k.tolist() if 0 < n < vocab]
    assert torch.equal(got, apply_top_k_top_p(logits.clone(), k, None, max_k=max(on, default=0)))


@settings(deadline=None)
@given(logits_rows(), st.data())
def test_top_p_keeps_the_smallest_nucleus(logits, data):
    masses = st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]) | st.floats(1e-6, 1)
    p = per_row(logits, masses, data, torch.float64)
    got = apply_top_k_top_p(logits.clone(), None, p)
    for row, out, nucleus, mass in zip(logits, got, kept(got), p.tolist()):
        if mass == 1.0:
            assert torch.equal(row, out)
            continue
        assert torch.equal(out[nucleus], row[nucleus])
        # Rounding may make equals of unequal logits, so the order is that of the float32 probabilities.
        probs32, probs = row.softmax(-1).tolist(), softmax64(row.tolist())
        order = sorted(range(len(probs)), key=lambda i: (-probs32[i], i))
        assert nucleus == sorted(order[: len(nucleus)]) and nucleus
        assert sum(probs[i] for i in nucleus) >= mass - 1e-6
        assert sum(probs[i] for i in order[: len(nucleus) - 1]) < mass + 1e-6


@pytest.mark.parametrize("p, size", [(1e-12, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.8, 4), (1, 4)])
def test_top_p_cuts_through_ties_by_lowest_index(p, size):
    got = apply_top_k_top_p(torch.zeros(2, 4), None, torch.tensor([p, 1.0], dtype=torch.float64))
    assert kept(got) == [list(range(size)), [0, 1, 2, 3]]


def test_top_p_counts_mass_after_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for k, p, want in ((0, 0.65, [0, 1]), (2, 0.65, [0, 1]), (2, 0.55, [0]), (3, 0.75, [0, 1])):
        assert kept(apply_top_k_top_p(logits.clone(), torch.tensor([k]), torch.tensor([p]))) == [want], (k, p)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_nucleus_of_a_large_vocabulary_matches_a_stable_sort(spread):
    logits = torch.randn(6, 5003, generator=torch.Generator().manual_seed(1)).mul(spread).bfloat16().float()
    p = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.99, 0.99999], dtype=torch.float64)
    probs = logits.softmax(-1)
    by_rank, order = probs.sort(dim=-1, descending=True, stable=True)
    exact = by_rank.double()
    want = torch.zeros_like(logits, dtype=torch.bool).scatter_(
        1, order, exact.cumsum(-1) - exact < p[:, None] * exact.sum(-1, keepdim=True))
    assert torch.equal(apply_top_k_top_p(logits, None, p) > -INF, want)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any), st.integers(0, 2**20 - 1))
def test_draw_is_the_inverse_cdf(weights, numerator):
    """Dyadic probabilities and numbers, so that the walk along the CDF is exact."""
    u = Fraction(numerator, 2**20)
    cdf = np.cumsum(weights)
    want = next(i for i, upto in enumerate(cdf) if upto > u * int(cdf[-1]))
    probs = torch.tensor([weights], dtype=torch.float32) / 256
    assert draw(probs, torch.tensor([float(u)], dtype=torch.float64)).tolist() == [want]


@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, LAST_U, 1.0])
def test_draw_never_takes_what_is_impossible(u):
    rows = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1e-30, 1, 0], [0, 0.5, 0.5, 0],
                         [1e-38] * 4])
    possible = rows * 2.0**61 >= 1
    possible[-1] = True  # a row of nothing: any index will do, but an index it must be
    token = draw(rows.clone(), torch.full((len(rows),), u, dtype=torch.float64))
    assert possible.gather(1, token[:, None]).all(), token


def test_draw_reaches_every_token_of_a_flat_row():
    vocab = 1000
    numbers = (torch.arange(vocab, dtype=torch.float64) + 0.5) / vocab
    assert draw(torch.zeros(vocab, vocab).softmax(-1), numbers).tolist() == list(range(vocab))


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_an_unusable_row_stays_in_range_and_alone(bad):
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
    k, p = torch.tensor([4, 4, 0]), torch.tensor([0.9, 0.9, 0.5], dtype=torch.float64)
    u = torch.full((3,), 0.7, dtype=torch.float64)
    spoiled = logits.clone()
    spoiled[1] = bad
    min_p = torch.full((3,), 0.01)
    masks = [apply_top_k_top_p(apply_min_p(x.clone(), min_p), k, p) for x in (logits, spoiled)]
    tokens = [draw(mask.softmax(-1), u) for mask in masks]
    assert torch.equal(masks[0][[0, 2]], masks[1][[0, 2]])
    assert torch.equal(tokens[0][[0, 2]], tokens[1][[0, 2]])
    assert 0 <= int(tokens[1][1]) < 17


@pytest.mark.parametrize("rows, vocab", [(1, 1), (0, 5), (7, 1), (33, 257), (2, 4099)])
def test_a_row_does_not_depend_on_its_batch(rows, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    k, u = torch.arange(rows) % 5, torch.rand(rows, generator=generator, dtype=torch.float64)
    p, min_p = 1 - u / 2, u.float() / 10

    def pipeline(at):
        x = apply_top_k_top_p(apply_min_p(logits[at].clone(), min_p[at]), k[at], p[at])
        return x, draw(x.softmax(-1), u[at])

    masked, tokens = pipeline(slice(None))
    for i in range(rows):
        alone, token = pipeline(slice(i, i + 1))
        assert torch.equal(alone[0], masked[i]) and token[0] == tokens[i]
