"""Reading a request's body: bounded while it arrives, then JSON into a checked struct."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from ...plugins.log import get_logger
from .api import Limits
from .errors import ApiError, ClientGoneError, refused

T = TypeVar("T", bound=msgspec.Struct)
logger = get_logger(__name__)
MAX_IGNORED_NAMES = 32

Unsupported = Mapping[str, tuple[Any, ...]]
"""Fields we know and cannot honour, with the values that ask for nothing."""


async def read_json(
    request: Request, kind: type[T], limits: Limits, unsupported: Unsupported
) -> tuple[T, dict[str, str]]:
    """The request's body as `kind`, and a response header that lists the fields that `kind` does not have.

    Null means absent. Raises ApiError: 400 for what is not such an object (naming the field), 408, 413.
    """
    fields = _parse(await _read(request, limits))
    for name, harmless in unsupported.items():
        if fields.get(name) not in (None, *harmless):
            raise refused(f"{name} is not supported by this server", name, "unsupported_parameter")
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        struct = msgspec.convert(given, kind, str_keys=True)
    except msgspec.ValidationError as exc:
        what, _, path = str(exc).partition(" - at ")
        raise ApiError(400, f"{what}{path and f' at {path}'}", param=_param(path)) from None
    ignored = [n for n in given if n not in kind.__struct_fields__ and n not in unsupported]
    names = [
        n if n.isascii() and n.isidentifier() and len(n) <= 64 else "?" for n in ignored[:MAX_IGNORED_NAMES]
    ]
    if not names:
        return struct, {}
    logger.debug("ignored request fields: %s", ", ".join(names))
    return struct, {"x-nybble-ignored": ", ".join(names)}


async def _read(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises ApiError: 413 as soon as it is too large, 408 when it does not come."""
    too_large = ApiError(
        413,
        f"the body is larger than {limits.body_bytes} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} s",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    """A JSON object; NaN, Infinity, numbers out of range, invalid UTF-8 and absurd nesting are refused."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ApiError(400, f"the body is not JSON: {exc}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return fields


def _param(path: str) -> str | None:
    """The field in a msgspec error path: "`$.messages[0].role`" -> "messages[0].role"."""
    return path.rpartition("$")[2].strip("`.") or None
