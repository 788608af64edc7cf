"""A client of a server on urllib: what `nybble chat --url` and `nybble experts --url` talk through."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.parse import urlsplit

from ...plugins.errors import NybbleError, UsageError
from ..expert_stats import ExpertCounts, from_json
from ..server.args import checked_keys

TIMEOUT_SECONDS = 300
DATA = b"data: "


class Client:
    """One server.

    Args:
        url: http:// or https://, with or without /v1.
        key: sent as a bearer token.

    Every method raises UsageError when the server refuses what was asked (4xx) and a plain NybbleError when it
    fails, cannot be reached or answers as no such server would. So does the constructor for a bad URL or key.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.base = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.base)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError("--url must be like http://127.0.0.1:8000, with http:// or https://", found=url)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {checked_keys([key])[0]}"

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with self._understood(), self._call("/v1/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def expert_counts(self, *, reset: bool) -> list[ExpertCounts]:
        """What the server counted of its experts; `reset` to let it begin anew."""
        path = "/nybble/experts/reset" if reset else "/nybble/experts"
        with self._understood(), self._call(path, {} if reset else None) as response:
            return from_json(response.read())

    def chat(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """Stream a chat completion's text."""
        with self._understood(), self._call("/v1/chat/completions", body | {"stream": True}) as lines:
            yield from read_events(lines)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """What breaks while an answer is read, as a NybbleError."""
        try:
            yield
        except (OSError, HTTPException) as error:
            raise NybbleError(f"the connection to {self.base} broke", found=_words(error)) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise NybbleError(
                f"{self.base} does not answer like an OpenAI server", found=_words(error), fix="check --url"
            ) from error

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers)  # noqa: S310  scheme was checked
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UsageError(f"{self.base} refused the request", found=_server_words(error)) from error
            raise NybbleError(f"{self.base} failed", found=_server_words(error)) from error
        except (ValueError, InvalidURL) as error:
            raise UsageError("--url cannot be asked", found=error) from error
        except (OSError, HTTPException) as error:
            raise NybbleError(
                f"cannot reach {self.base}", found=_words(error), fix="is nybble serve running there?"
            ) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _server_words(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    try:
        return f"{error.code}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{error.code} {error.reason}: {text[:200]}"


def read_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The text in a stream of server-sent events. Raises NybbleError on an error event or an early end."""
    for line in lines:
        if not line.startswith(DATA):
            continue
        data = line[len(DATA) :].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise NybbleError("the server ended the answer", found=event["error"].get("message"))
        for choice in event.get("choices", []):
            if text := choice["delta"].get("content"):
                yield text
    raise NybbleError("the answer was cut off", found="the stream ended without [DONE]")
