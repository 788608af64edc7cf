"""Loading, ready, draining: whether a request may start, and how the ones that did are ended."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from .errors import ApiError, ClientGoneError

T = TypeVar("T")
POLL_SECONDS = 0.05
FAREWELL_SECONDS = 2.0
"""How long ended requests get to write their error before their connections are closed."""


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """The phase of one server and the requests in it.

    `in_flight` counts HTTP requests that were let in and not answered; `generating` has the tasks that wait
    for the engine. Belongs to one event loop.
    """

    def __init__(self, phase: Phase = Phase.READY) -> None:
        self.phase = phase
        self.in_flight = 0
        self.hurried = False
        self.generating: set[asyncio.Task[Any]] = set()

    def check_open(self) -> None:
        """Raises ApiError 503 while loading and while draining."""
        if self.phase is not Phase.READY:
            raise ApiError(503, f"the server is {self.phase.value}", code=f"server_{self.phase.value}")

    async def guard(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` until it ends, the client leaves (ClientGoneError) or the server hurries (ApiError 503).

        Starlette does not cancel a handler whose client left; a request nobody reads must not hold KV blocks.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(disconnected(receive))
        self.generating.add(task)
        if self.hurried:
            task.cancel()
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled():
                raise ApiError(503, "the server is stopping", code="server_stopped")
            if not task.done():
                raise ClientGoneError
            return task.result()
        finally:
            self.generating.discard(task)
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def hurry(self) -> None:
        """End every generation now; their clients get an error."""
        self.hurried = True
        for task in self.generating:
            task.cancel()

    async def drain(self, seconds: float) -> None:
        """Let nobody in, give those inside `seconds`, then end the rest. `hurry` cuts it short."""
        self.phase = Phase.DRAINING
        deadline = time.monotonic() + seconds
        while self.in_flight and not self.hurried and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self.hurry()
        await self.farewell()

    async def farewell(self) -> None:
        """Wait, not for long, until everyone has their last words."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed its side. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
