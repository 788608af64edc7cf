"""The hash chain: equal prefixes, and nothing else, have equal hashes."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.sched.hashing import ROOT, extend_block_hashes, hash_block

TOKENS = st.lists(st.integers(0, 3) | st.just(2**32 - 1), max_size=12)


def chain(tokens: list[int], size: int, salt: str | None = None) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, tokens, size, salt)
    return hashes


def test_a_block_hash_is_sha256_of_parent_tokens_and_extra_keys():
    message = bytes(32) + bytes([1, 0, 0, 0, 2, 1, 0, 0]) + b"x"
    assert hash_block(ROOT, [1, 258], b"x") == hashlib.sha256(message).digest()


@given(TOKENS, TOKENS, st.integers(1, 4), st.none() | st.text(max_size=2), st.none() | st.text(max_size=2))
def test_hashes_agree_exactly_on_the_common_full_blocks(a, b, size, salt_a, salt_b):
    hashes_a, hashes_b = chain(a, size, salt_a), chain(b, size, salt_b)
    assert (len(hashes_a), len(hashes_b)) == (len(a) // size, len(b) // size)
    for i in range(min(len(hashes_a), len(hashes_b))):
        end = (i + 1) * size
        assert (hashes_a[i] == hashes_b[i]) == (salt_a == salt_b and a[:end] == b[:end])


@given(TOKENS, st.integers(0, 12), st.integers(1, 4), st.none() | st.text(max_size=2))
def test_extending_step_by_step_equals_hashing_at_once(tokens, cut, size, salt):
    hashes = chain(tokens[:cut], size, salt)
    extend_block_hashes(hashes, tokens, size, salt)
    assert hashes == chain(tokens, size, salt)


def test_a_salt_may_be_any_text_that_json_can_carry():
    assert chain([1], 1, "\ud800") != chain([1], 1, "") != chain([1], 1, None)
