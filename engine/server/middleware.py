"""The outermost layer: request ids, access log, API keys, the phase, and an answer whatever goes wrong."""

from __future__ import annotations

import string
import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...plugins.log import get_logger
from .api import Api
from .auth import OPEN_PATHS
from .errors import ClientGoneError, to_api_error

logger = get_logger(__name__)
ALWAYS_ANSWERED = OPEN_PATHS | {"/metrics", "/version", "/load"}
"""Paths that are answered in every phase: they say how the server is."""
ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._-")
MAX_ID_CHARACTERS = 128


def sane_id(asked: str | None) -> str:
    """The client's request id if it is safe in headers and logs, else a fresh one."""
    if asked and len(asked) <= MAX_ID_CHARACTERS and ID_CHARACTERS.issuperset(asked):
        return asked
    return uuid.uuid4().hex


class Edge:
    """ASGI middleware round the whole application. No exception passes, so none is logged with its text."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await _Exchange(self.api, scope, send).run(self.app, receive)


class _Exchange:
    """One request and its answer."""

    def __init__(self, api: Api, scope: Scope, send: Send) -> None:
        self.api, self.scope, self._send = api, scope, send
        self.headers = Headers(scope=scope)
        self.state = scope.setdefault("state", {})
        self.state["request_id"] = sane_id(self.headers.get("x-request-id"))
        self.status: int | None = None
        self.began = time.monotonic()

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        life, path = self.api.lifecycle, self.scope["path"]
        counted = path not in ALWAYS_ANSWERED
        life.in_flight += counted
        try:
            if path not in OPEN_PATHS:
                self.state["key_id"] = self.api.keys.identify(self.headers.get("authorization"))
            if counted:
                life.check_open()
            await app(self.scope, receive, self.send)
        except ClientGoneError:
            self.status = 499
        except Exception as exc:
            await self._answer_error(exc, receive)
        finally:
            life.in_flight -= counted
            self._log(path)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.state["request_id"]
        await self._send(message)

    async def _answer_error(self, exc: Exception, receive: Receive) -> None:
        error = to_api_error(exc)
        if error is not exc and error.status == 500:
            # Frames only: the exception's own text may quote a prompt.
            frames = "".join(traceback.format_tb(exc.__traceback__))
            logger.error("%s in request %s\n%s", type(exc).__name__, self.state["request_id"], frames)
        if self.status is None:
            await error.response()(self.scope, receive, self.send)

    def _log(self, path: str) -> None:
        if self.api.args.disable_access_log or path in ALWAYS_ANSWERED:
            return
        shown = path[:200].encode("unicode_escape").decode("ascii")
        milliseconds = (time.monotonic() - self.began) * 1e3
        logger.info(
            "%s %s -> %s in %.0f ms (%s)",
            self.scope["method"],
            shown,
            self.status,
            milliseconds,
            self.state["request_id"],
        )
