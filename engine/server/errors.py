"""Errors on the wire: one object for every status that is not 2xx, and which exception gets which status."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...plugins.errors import EngineDeadError, RequestError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
RETRY_SECONDS = {429: 1, 503: 5}
LINGER_SECONDS = 2.0


class ApiError(Exception):
    """An answer that is an error: HTTP status, message for people, `code` and `param` for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if status in RETRY_SECONDS:
            self.headers.setdefault("retry-after", str(RETRY_SECONDS[status]))

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error")

    def body(self) -> bytes:
        """The JSON text `{"error": {"message", "type", "param", "code"}}`; all four keys are always there."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        kind = LingeringResponse if self.headers.get("connection") == "close" else Response
        return kind(self.body(), self.status, self.headers, "application/json")


class LingeringResponse(Response):
    """Answers, then reads on for a moment: to close on a client that still sends would destroy the answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGoneError(Exception):
    """The client closed its connection: there is nobody to answer."""


def refused(message: str, param: str, code: str | None = None) -> ApiError:
    """A 400 that names the field it is about."""
    return ApiError(400, message, param=param, code=code)


def to_api_error(exc: BaseException) -> ApiError:
    """The answer for any exception. What we did not foresee says nothing: its text may quote a prompt."""
    match exc:
        case ApiError():
            return exc
        case RequestError():
            status = 429 if exc.code == "engine_overloaded" else 400
            return ApiError(status, str(exc), param=exc.param, code=exc.code)
        case EngineDeadError():
            return ApiError(503, "the engine stopped; the server's log says why", code="engine_dead")
        case HTTPException(status_code=404):
            return ApiError(404, "no such path", code="not_found")
        case HTTPException(status_code=405):
            return ApiError(
                405,
                "this path has another method",
                code="method_not_allowed",
                headers=dict(exc.headers or {}),
            )
        case HTTPException():
            return ApiError(exc.status_code, exc.detail, headers=dict(exc.headers or {}))
        case _:
            return ApiError(500, "internal error; the server's log has the trace", code="internal_error")
