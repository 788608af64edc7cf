"""Deltas join to what decoding at once gives, whatever the tokens; stop strings are found anywhere."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nybble.engine.text.detokenizer import MAX_HELD_TOKENS, Detokenizer, StopStrings
from nybble.engine.text.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("abthe cat中文é😀👍🏽\u200d\ufffd\n ñ▁"), max_size=30) | st.text(max_size=20)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def deltas(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="中文\ufffd")
def test_text_survives_any_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    parts = deltas(Detokenizer(tokenizer), ids)
    assert "".join(parts) == tokenizer.decode(ids) == Detokenizer(tokenizer).push(ids) + parts[-1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_vocabulary_decode_as_at_once(
    byte_level: Tokenizer, data: st.DataObject
) -> None:
    """Random ids are mostly broken UTF-8; a U+FFFD is sent only where the whole text has one."""
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=60))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(byte_level, skip_special_tokens=skip)
    assert "".join(deltas(detokenizer, ids)) == byte_level.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_bad_byte_does_not_take_back_good_characters(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    """The library makes a run of byte tokens all U+FFFD; what was finished before may have been sent."""
    high = st.integers(4 + 0x80, 4 + 0xFF)
    ids = data.draw(st.lists(high | st.integers(4 + 0x100, byte_fallback.vocab_size - 1), max_size=40))
    text, whole = "".join(deltas(Detokenizer(byte_fallback), ids)), byte_fallback.decode(ids)
    rest = iter(text)
    assert all(char in rest for char in whole if char != "\ufffd"), "ours lacks text of the library's"
    assert [c for c in text if c.isascii()] == [c for c in whole if c.isascii()]
    assert text == whole or "\ufffd" in whole


@pytest.mark.parametrize(("tokens", "expected"), [
    (["<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "a"], ["", "", "中", "", "\ufffda", ""]),
    (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], ["", "", "", "😀", ""]),
    (["<0xF0>", "<0x9F>"], ["", "", "\ufffd\ufffd"]),
    (["▁a", "<s>", "▁ab"], ["a", "", " ab", ""]),
    (["<0xC3>", "a", "<0xA9>"], ["", "\ufffda", "", "\ufffd"]),
])
def test_byte_fallback_step_by_step(byte_fallback: Tokenizer, tokens: list[str], expected: list[str]) -> None:
    ids = [byte_fallback.backend.token_to_id(token) for token in tokens]
    assert deltas(Detokenizer(byte_fallback), ids) == expected


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS, text=TEXTS)
@example(prompt="the", text=" cat")
def test_a_completion_goes_on_where_its_prompt_ends(byte_fallback: Tokenizer, prompt: str, text: str) -> None:
    """The space between the two is the completion's, though decoders strip a text's first space."""
    ids, whole = byte_fallback.encode(prompt), byte_fallback.encode(prompt + text)
    if whole[: len(ids)] != ids or not byte_fallback.decode(ids) or "\ufffd" in prompt:
        return
    completion = "".join(deltas(Detokenizer(byte_fallback, ids), whole[len(ids):]))
    assert byte_fallback.decode(ids) + completion == byte_fallback.decode(whole)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_split_between_prompt_and_completion(
    tokenizers: dict[str, Tokenizer], kind: str, cut: int
) -> None:
    tokenizer = tokenizers[kind]
    ids = [i for byte in "🜁".encode() for i in [tokenizer.backend.token_to_id(
        BYTE_TOKENS[byte] if kind == "byte_fallback" else byte_letter(byte))]]
    prompt = tokenizer.encode("the cat " * 5) + ids[:cut]
    assert "".join(deltas(Detokenizer(tokenizer, prompt), ids[cut:])) == "🜁"


def byte_letter(byte: int) -> str:
    """How a byte-level vocabulary spells a byte outside printable ASCII and Latin-1."""
    unprintable = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + unprintable.index(byte)) if byte in unprintable else chr(byte)


def test_bytes_that_are_no_text_are_not_held_for_ever(tokenizers: dict[str, Tokenizer]) -> None:
    for kind, token in (("byte_level", byte_letter(0xFF)), ("byte_fallback", "<0xFF>")):
        tokenizer = tokenizers[kind]
        parts = deltas(Detokenizer(tokenizer), [tokenizer.backend.token_to_id(token)] * 100)
        assert "".join(parts) == "\ufffd" * 100
        assert sum(map(bool, parts)) > 100 // MAX_HELD_TOKENS


@pytest.mark.parametrize("bad", range(10, 20))
def test_a_character_behind_bad_bytes_stays_whole(byte_level: Tokenizer, bad: int) -> None:
    letters = [byte_letter(byte) for byte in b"\xff" * bad + "中🜁".encode()]
    ids = [byte_level.backend.token_to_id(letter) for letter in letters]
    assert "".join(deltas(Detokenizer(byte_level), ids)) == "\ufffd" * bad + "中🜁"


@pytest.mark.parametrize(("skip", "spaces", "expected"), [
    (True, True, "the cat"), (False, True, "the <|user|> </s> cat"), (False, False, "the <|user|></s> cat"),
])
def test_special_tokens(tokenizers: dict[str, Tokenizer], skip: bool, spaces: bool, expected: str) -> None:
    tokenizer = tokenizers["word"]
    ids = [tokenizer.backend.token_to_id(token) for token in ("the", "<|user|>", "</s>", "cat")]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    assert "".join(deltas(detokenizer, ids)) == expected


def test_ids_without_a_token_read_as_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    padded = [tokenizer.vocab_size + 5, *ids, tokenizer.vocab_size + 6]
    assert "".join(deltas(Detokenizer(tokenizer), padded)) == tokenizer.decode(ids)


def reference_stop(text: str, stops: list[str], exempt: int) -> tuple[str, int, int] | None:
    """Character by character: the first position at which some stop string is complete, in list order."""
    for end in range(exempt + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return stop, end - len(stop), end
    return None


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab ", max_size=30),
       stops=st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=4),
       cuts=st.sets(st.integers(0, 30)), exempt=st.integers(0, 10), include=st.booleans())
def test_stop_strings_at_any_split(
    text: str, stops: list[str], cuts: set[int], exempt: int, include: bool
) -> None:
    """The same match however the text arrives, and never a character sent that the match takes back."""
    finder = StopStrings(stops, include_in_output=include)
    expected = reference_stop(text, stops, min(exempt, len(text)))
    checked, sent, match = min(exempt, len(text)), 0, None
    for end in sorted({*(c for c in cuts if exempt < c < len(text)), len(text)}):
        match = finder.find(text[:end], checked)
        if match is not None:
            break
        checked, sent = end, max(0, end - finder.hold_back)
    if expected is None:
        assert match is None
        return
    stop, start, end = expected
    assert match == (stop, end if include else start)
    assert sent <= match.end
