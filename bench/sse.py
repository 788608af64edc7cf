"""An incremental decoder of server-sent events (the WHATWG event stream format, without reconnection)."""

from __future__ import annotations

import re
from typing import NamedTuple

LINE_END = re.compile(rb"\r\n|\r|\n")
BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its `data` lines joined by newlines, and its name ("message" if it has none)."""

    data: bytes
    name: str


class EventDecoder:
    """Bytes in, as the network cuts them; events out as soon as their blank line is in.

    An event the stream does not finish is never returned.
    """

    def __init__(self) -> None:
        self._line = b""  # what came of the line that has not ended
        self._after_cr = False  # the last byte was a CR, so an LF that follows ends no other line
        self._at_start = True
        self._data: list[bytes] = []
        self._name = ""

    def feed(self, data: bytes) -> list[Event]:
        if self._after_cr and data.startswith(b"\n"):
            data, self._after_cr = data[1:], False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        *lines, self._line = LINE_END.split(self._line + data)
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> Event | None:
        if self._at_start:
            line, self._at_start = line.removeprefix(BOM), False
        if not line:
            event = Event(b"\n".join(self._data), self._name or "message") if self._data else None
            self._data, self._name = [], ""
            return event
        field, _, value = line.partition(b":")  # a comment is a line whose field name is empty
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
        return None
