"""uvicorn's h11 connection with a deadline for request heads, JSON for malformed ones, and a way to drop."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api import Limits
from .errors import ApiError


def connection_class(limits: Limits) -> type[H11Protocol]:
    """The protocol class to give to uvicorn.

    h11 rather than httptools, which accepts heads of any size (64 MB were tried).
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.app_state = {**self.app_state, "drop": self._drop}
            self._head_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._cancel_deadline()
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
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

        def _drop(self) -> None:
            self.transport.abort()

    return Connection
