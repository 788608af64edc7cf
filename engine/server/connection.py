"""uvicorn's h11 connection with bounds on heads and unread bodies, JSON for malformed ones, and a way to drop."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api import Limits
from .errors import LINGER_SECONDS, ApiError

ORIGIN = re.compile(rb"https?://[^/?]*", re.IGNORECASE)


class Heads(h11.Connection):
    """h11 with two rules for request heads that it leaves to others.

    One that came whole in one read is still bounded, and a target with scheme and authority (as sent to a proxy)
    means its path.
    """

    def __init__(self, head_bytes: int) -> None:
        super().__init__(h11.SERVER, head_bytes)
        self._head_bytes = head_bytes

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        lines = [event.method, event.target, *(part for header in event.headers for part in header)]
        if sum(len(part) + 2 for part in lines) > self._head_bytes:
            raise h11.RemoteProtocolError("the request's head is too long", error_status_hint=431)
        if (origin := ORIGIN.match(event.target)) is None:
            return event
        path = event.target[origin.end() :]
        return h11.Request(
            method=event.method,
            headers=event.headers,
            target=path if path.startswith(b"/") else b"/" + path,
            http_version=event.http_version,
        )


def connection_class(limits: Limits) -> type[H11Protocol]:
    """The protocol class to give to uvicorn.

    h11 rather than httptools, which accepts heads of any size (64 MB were tried).

    A client that closes its sending side counts as gone, even if it would still read: nothing else tells that it
    left, and what it asked for must not go on computing.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.app_state = {**self.app_state, "drop": self._drop}
            self.conn = Heads(limits.head_bytes)
            self._head_deadline: asyncio.TimerHandle | None = None
            self._linger: asyncio.TimerHandle | None = None
            self._unread_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            if self._linger is not None:
                self._unread_bytes += len(data)
                if self._unread_bytes > limits.body_bytes:
                    self.transport.close()
                    return
            answered = self.cycle
            super().data_received(data)
            if self.cycle is not answered or self.conn.their_state is not h11.SEND_BODY:
                self._end_linger()
            self._watch_head()

        def on_response_complete(self) -> None:
            """Of a body that nobody wanted to read, the rest must come soon and be small, or the client goes.

            Not at once: to close on a client that still sends would destroy its answer.
            """
            if self.conn.their_state is h11.SEND_BODY:
                self._unread_bytes = 0
                self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            self._end_linger()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._cancel_deadline()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way, or was given
                self.transport.close()
                return
            body = ApiError(400, msg, code="invalid_http").body()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            events = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            self.transport.writelines([self.conn.send(event) for event in events])
            self.transport.close()

        def _watch_head(self) -> None:
            """A head that began must end in time; once it has, the body has its own deadline."""
            if self.conn.their_state is not h11.IDLE:
                self._cancel_deadline()
            elif self._head_deadline is None:
                self._head_deadline = self.loop.call_later(limits.head_seconds, self._drop)

        def _cancel_deadline(self) -> None:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None

        def _end_linger(self) -> None:
            if self._linger is not None:
                self._linger.cancel()
                self._linger = None

        def _drop(self) -> None:
            self.transport.abort()

    return Connection
