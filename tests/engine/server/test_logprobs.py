"""Log probabilities in both shapes, with the entries that engines really give."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import pytest

from nybble.engine.request import Logprob
from nybble.engine.server.logprobs import FLOOR, TextOffsets, chat_logprobs, completion_logprobs, finite

A, B, C = Logprob(-0.1, 1, "a"), Logprob(-2.0, 2, "b"), Logprob(-9.0, 77, "c")
PIECES = [b"<s>", b" Hi", b"\xe4", b"\xb8\xad", b"\xb8", b"x", b"\xff"]
TOKENIZER = SimpleNamespace(special_ids=frozenset({0}), token_bytes=PIECES.__getitem__)


def test_an_unlikely_sample_comes_on_top_of_the_asked_number():
    entries = [{3: C, 1: A, 2: B}]
    assert completion_logprobs([3], entries, None, [0]).top_logprobs == [{"a": -0.1, "b": -2.0, "c": -9.0}]
    [token] = chat_logprobs([3], entries, None, 2).content
    assert (token.token, token.logprob) == ("c", -9.0)
    assert [top.token for top in token.top_logprobs] == ["a", "b"]
    assert len(chat_logprobs([3], entries, None, -1).content[0].top_logprobs) == 3


def test_tokens_with_one_text_keep_the_likelier():
    entries = [{5: Logprob(-3.0, 2, "a"), 6: Logprob(-1.0, 1, "a")}]
    found = completion_logprobs([5], entries, None, [0])
    assert found.token_logprobs == [-3.0] and found.top_logprobs == [{"a": -1.0}]


def test_parts_of_characters_are_told_apart_by_their_bytes():
    entries = [{2: Logprob(-0.1, 1, "\ufffd"), 3: Logprob(-1.0, 2, "\ufffd"), 5: Logprob(-2.0, 3, "x")}]
    found = completion_logprobs([2], entries, TOKENIZER, [0])
    assert found.tokens == [r"bytes:\xe4"]
    assert found.top_logprobs == [{r"bytes:\xe4": -0.1, r"bytes:\xb8\xad": -1.0, "x": -2.0}]
    [token] = chat_logprobs([2], entries, TOKENIZER, -1).content
    assert [(top.token, bytes(top.bytes)) for top in (token, *token.top_logprobs)] == [
        (r"\xe4", b"\xe4"), (r"\xe4", b"\xe4"), (r"\xb8\xad", b"\xb8\xad"), ("x", b"x")]


def test_minus_infinity_is_written_as_a_number():
    entries = [None, {1: Logprob(-inf, 9, "a")}]
    found = completion_logprobs([0, 1], entries, None, [0, 1])
    assert found.token_logprobs == [None, FLOOR] and found.top_logprobs == [None, {"a": FLOOR}]
    assert finite(entries) == [None, {1: Logprob(FLOOR, 9, "a")}]
    assert chat_logprobs([1], entries[1:], None, 0).content[0].logprob == FLOOR


@pytest.mark.parametrize(("prompt", "echo", "tokens", "begins"), [
    ([], "", [1, 2, 3, 5], [0, 3, 3, 4]),  # " Hi中x"
    ([], "", [2, 5, 6, 5], [0, 0, 2, 3]),  # "�x�x": known to be bad once the x is there
    ([2], "", [4, 6, 5], [0, 0, 2]),  # "��x": the prompt began a character, and nobody ended it
    ([2], "", [3, 5], [0, 1]),  # "中x": the prompt began the character
    ([5, 0, 1], " Hi", [5], [0, 0, 0, 3]),  # the text has neither
    ([0, 1, 1], "Hi Hi", [0, 5], [0, 0, 2, 5, 5]),  # no bos, no space in front; special tokens are left out
    ([0, 1], "<s> Hi", [5], [0, 3, 6]),
])
def test_offsets_follow_the_text(prompt, echo, tokens, begins):
    offsets = TextOffsets(TOKENIZER, True)
    echoed = offsets.prompt(prompt, echo)
    assert (echoed if echo else []) + [at for token in tokens for at in offsets.completion([token])] == begins


def test_special_tokens_count_where_they_are_shown():
    assert TextOffsets(TOKENIZER, False).completion([0, 5]) == [0, 3]


def test_a_token_without_text_is_named_by_its_id():
    assert completion_logprobs([7], [{7: Logprob(-1.0)}], None, [0]).tokens == ["token_id:7"]
