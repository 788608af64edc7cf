"""Log probabilities in both shapes, with the entries that engines really give."""

from __future__ import annotations

from math import inf

from nybble.engine.request import Logprob
from nybble.engine.server.logprobs import FLOOR, chat_logprobs, completion_logprobs, finite

A, B, C = Logprob(-0.1, 1, "a"), Logprob(-2.0, 2, "b"), Logprob(-9.0, 77, "c")


def test_an_unlikely_sample_comes_on_top_of_the_asked_number():
    entries = [{3: C, 1: A, 2: B}]
    assert completion_logprobs([3], entries, None, 0).top_logprobs == [{"a": -0.1, "b": -2.0, "c": -9.0}]
    [token] = chat_logprobs([3], entries, None, 2).content
    assert (token.token, token.logprob) == ("c", -9.0)
    assert [top.token for top in token.top_logprobs] == ["a", "b"]
    assert len(chat_logprobs([3], entries, None, -1).content[0].top_logprobs) == 3


def test_tokens_with_one_text_keep_the_likelier():
    entries = [{5: Logprob(-3.0, 2, "\ufffd"), 6: Logprob(-1.0, 1, "\ufffd")}]
    found = completion_logprobs([5], entries, None, 0)
    assert found.token_logprobs == [-3.0] and found.top_logprobs == [{"\ufffd": -1.0}]


def test_minus_infinity_is_written_as_a_number():
    entries = [None, {1: Logprob(-inf, 9, "a")}]
    found = completion_logprobs([0, 1], entries, None, 0)
    assert found.token_logprobs == [None, FLOOR] and found.top_logprobs == [None, {"a": FLOOR}]
    assert finite(entries) == [None, {1: Logprob(FLOOR, 9, "a")}]
    assert chat_logprobs([1], entries[1:], None, 0).content[0].logprob == FLOOR


def test_offsets_follow_the_tokens():
    entries = [{1: Logprob(-1.0, 1, "äö")}, {2: Logprob(-1.0, 1, "")}, {3: Logprob(-1.0, 1, "x")}]
    assert completion_logprobs([1, 2, 3], entries, None, 10).text_offset == [10, 12, 12]
    assert chat_logprobs([1], entries[:1], None, 0).content[0].bytes == [0xC3, 0xA4, 0xC3, 0xB6]


def test_a_token_without_text_is_named_by_its_id():
    assert completion_logprobs([7], [{7: Logprob(-1.0)}], None, 0).tokens == ["token_id:7"]
