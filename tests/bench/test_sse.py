"""The event decoder against the format's rules, however the network cuts the bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.bench.sse import Event, EventDecoder

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXT = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=12)
NAMES = st.sampled_from(["message", "error", "done"])


@st.composite
def streams(draw):
    """(bytes of a stream, the events in it): comments, unknown fields and several data lines among them."""
    out, events = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), []
    for _ in range(draw(st.integers(0, 4))):
        name, texts = draw(NAMES), draw(st.lists(TEXT, max_size=3))
        lines = [draw(st.sampled_from([b": ping", b"id: 7", b"retry", b":"]))] if draw(st.booleans()) else []
        lines += [b"event: " + name.encode()] if name != "message" else []
        for text in texts:
            glued = draw(st.booleans()) and not text.startswith(" ")
            lines.append((b"data:" if glued else b"data: ") + text.encode())
        end = draw(ENDS)  # one for the whole event: CR, then the LF of an empty line, would be a single end
        out += b"".join(line + end for line in [*lines, b""])
        if texts:
            events.append(Event("\n".join(texts).encode(), name))
    return out, events


def decode(stream: bytes, cuts: list[int]) -> list[Event]:
    decoder, edges = EventDecoder(), [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for a, b in pairwise(edges) for event in decoder.feed(stream[a:b])]


@given(streams(), st.lists(st.integers(0, 10_000), max_size=20))
def test_cuts_do_not_matter(stream, cuts):
    data, events = stream
    assert decode(data, cuts) == events
    assert decode(data, list(range(len(data)))) == events


@pytest.mark.parametrize(("data", "events"), [
    (b"data: 1\n\ndata: 2\n", [b"1"]),  # the second has no blank line
    (b"data\n\n", [b""]),
    (b"data:  two spaces\n\n", [b" two spaces"]),
    (b"event: lonely\n\ndata: x\n\n", [b"x"]),
    (b": only a comment\n\n\n\n", []),
])
def test_corners(data, events):
    assert decode(data, []) == [Event(event, "message") for event in events]


def test_an_event_is_out_with_its_last_byte():
    decoder = EventDecoder()
    assert decoder.feed(b"data: x\r\n\r") == [Event(b"x", "message")]
    assert decoder.feed(b"\ndata: y\n\n") == [Event(b"y", "message")]
