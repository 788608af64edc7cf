"""Server-sent events: `data: <json>` and a blank line, `[DONE]` at the end, an error frame when it fails.

No comments unless asked for: vLLM's benchmark client loses the chunk that follows one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from .api import Api
from .errors import ClientGoneError, to_api_error

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream:
    """A streamed answer, as an ASGI application.

    Its status is sent with the first event, so that what fails before is an ordinary error.
    """

    def __init__(self, api: Api, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        self._api, self._events, self._started = api, events, False
        self._drop: Callable[[], None] = lambda: None
        self.raw_headers = Headers({**headers, **HEADERS}).raw

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._drop = scope.get("state", {}).get("drop", lambda: None)
        try:
            await self._api.lifecycle.guard(receive, self._write_all(send))
        except Exception as exc:
            if self._started and not isinstance(exc, ClientGoneError):
                await self._send(send, b"data: " + to_api_error(exc).body() + b"\n\n" + DONE, more=False)
            raise

    async def _write_all(self, send: Send) -> None:
        seconds = self._api.args.sse_keepalive
        async with aclosing(with_comments(self._events, seconds) if seconds > 0 else self._events) as events:
            async for chunk in events:
                await self._send(send, chunk)
        await self._send(send, DONE, more=False)

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        """Drops a client that does not read for too long; until then the engine merges what it makes."""
        try:
            async with asyncio.timeout(self._api.limits.stalled_seconds):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError:
            self._drop()
            raise ClientGoneError from None


async def with_comments(events: AsyncGenerator[bytes, None], seconds: float) -> AsyncGenerator[bytes, None]:
    """`events`, with a comment whenever none came for `seconds`."""
    async with aclosing(events):
        while True:
            pending = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                    yield COMMENT
            finally:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            chunk = pending.result()
            if chunk is None:
                return
            yield chunk
