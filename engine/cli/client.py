"""A client of /v1/chat/completions on urllib: what `nybble chat --url` talks through."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from ...plugins.errors import NybbleError, UsageError

TIMEOUT_SECONDS = 300
DATA = b"data: "


class Client:
    """One server.

    Args:
        url: http:// or https://, with or without /v1.
        key: sent as a bearer token.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError("--url must begin with http:// or https://", found=url)
        self.base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with self._call("/v1/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def chat(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """Stream a chat completion's text. Raises NybbleError when the server refuses or breaks off."""
        with self._call("/v1/chat/completions", body | {"stream": True}) as lines:
            yield from read_events(lines)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers)  # noqa: S310  scheme was checked
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise NybbleError(f"{self.base} refused the request", found=_server_words(error)) from error
        except OSError as error:
            raise UsageError(
                f"cannot reach {self.base}", found=error, fix="is nybble serve running there?"
            ) from error


def _server_words(error: urllib.error.HTTPError) -> str:
    text = error.read(4096).decode("utf-8", "replace")
    try:
        return f"{error.code}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
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
