"""The counter-based random numbers: SplitMix64's published values, uniformity, independence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.sampling import stream_state, uniforms
from nybble.csrc.sampling.rng import GAMMA, mix


def numbers(seeds, positions, stream=0):
    states = np.array([stream_state(int(seed), stream) for seed in seeds], dtype=np.uint64)
    return uniforms(states, np.asarray(positions))


def test_splitmix64_values():
    """The first outputs of SplitMix64 with seed 1234567, as published with the xoshiro generators."""
    counter = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GAMMA)
    assert mix(counter).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423,
                                     4593380528125082431, 16408922859458223821]


SEQUENCES = {
    "positions of seed 0": lambda n: numbers([0] * n, range(n)),
    "positions of seed 7": lambda n: numbers([7] * n, range(n)),
    "seeds at position 0": lambda n: numbers(range(n), [0] * n),
    "seeds at position 5": lambda n: numbers(range(n), [5] * n),
    "seeds in another stream": lambda n: numbers(range(n), [0] * n, stream=1),
    "seed and position together": lambda n: numbers(range(n), range(n)),
    "seed against position": lambda n: numbers(range(n), range(n - 1, -1, -1)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_uniform_and_uncorrelated(name):
    n, bins = 20_000, 50
    u = SEQUENCES[name](n)
    assert u.min() >= 0.0 and u.max() < 1.0
    expected = n / bins
    chi2 = ((np.histogram(u, bins, (0, 1))[0] - expected) ** 2 / expected).sum()
    assert 15 < chi2 < 100  # 49 degrees of freedom: outside this with probability 1e-5, too even included
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4.5 / n**0.5


def test_streams_and_seeds_do_not_repeat_each_other():
    every = np.concatenate([numbers(range(200), [p] * 200, stream) for p in range(20) for stream in range(3)])
    assert len(np.unique(every)) == len(every)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_each_number_is_its_own(pairs):
    seeds, positions = zip(*pairs)
    together = numbers(seeds, positions)
    assert together.tolist() == [numbers([s], [p])[0] for s, p in pairs]
    assert ((together >= 0) & (together < 1)).all()


def test_seeds_wrap_at_64_bits():
    assert stream_state(-1) == stream_state(2**64 - 1) != stream_state(1)
