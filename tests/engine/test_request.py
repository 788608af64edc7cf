"""SamplingParams refuses what no step should carry, naming the field."""

from __future__ import annotations

import math

import pytest

from nybble import SamplingParams
from nybble.plugins.errors import RequestError

BAD = [
    dict(n=0), dict(n=129), dict(n=True), dict(n=2, temperature=0), dict(presence_penalty=2.1),
    dict(frequency_penalty=-2.1), dict(repetition_penalty=0), dict(temperature=-0.1), dict(temperature=math.nan),
    dict(temperature=math.inf), dict(temperature="1"), dict(top_p=0), dict(top_p=1.1), dict(top_k=-2),
    dict(top_k=1.5), dict(min_p=-0.1), dict(min_p=1.1), dict(seed=2**64), dict(seed="a"), dict(max_tokens=0),
    dict(min_tokens=-1), dict(min_tokens=17), dict(logprobs=-2), dict(prompt_logprobs=-2), dict(stop=""),
    dict(stop=["x"] * 17), dict(stop=["x" * 1025]), dict(stop=["x"], detokenize=False), dict(logit_bias={5: 101.0}),
    dict(logit_bias=dict.fromkeys(range(1025), 1.0)), dict(allowed_token_ids=[]), dict(bad_words=[""]),
    dict(bad_words=["x"] * 129), dict(bad_words=["x" * 1025]), dict(stop_token_ids=[5] * 129),
    dict(truncate_prompt_tokens=-2),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:50])
def test_out_of_range_is_refused_by_name(bad):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**bad)
    assert (caught.value.param or "").partition("[")[0] in bad


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)


def test_replace_checks_again():
    with pytest.raises(RequestError):
        SamplingParams().replace(top_p=2.0)


def test_edges_pass():
    SamplingParams(n=128, presence_penalty=-2, top_p=1, top_k=-1, min_p=1, seed=-(2**63), max_tokens=None,
                   min_tokens=10**6, stop="x" * 1024, logprobs=-1, logit_bias={0: -100})
