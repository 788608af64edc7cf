"""A streaming OpenAI client on asyncio streams that notes when each event came in, and what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ..plugins import env
from ..plugins.errors import NybbleError, UsageError
from .sse import Event, EventDecoder

READ_BYTES = 1 << 16
SHOWN_ERROR_BYTES = 300
DONE = b"[DONE]"
FAILURES = (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError, msgspec.MsgspecError)


class ResponseError(Exception):
    """The server answered, and the answer is no completion."""


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    """Of /v1/completions (`text`) or /v1/chat/completions (`delta`)."""

    text: str | None = None
    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        return self.text or self.delta.content or self.delta.reasoning_content or ""


class Chunk(msgspec.Struct):
    """The part of a stream event that is measured."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An event with choices: when it came, tokens so far as far as the server says, and its text."""

    time: float
    tokens: int | None
    text: str


@dataclass(kw_only=True, eq=False)
class Record:
    """One request as it was seen. Times are seconds of `time.perf_counter`; `error` is empty on success."""

    prompt_tokens: int
    asked_tokens: int
    planned: float = 0.0
    sent: float = 0.0
    last: float = 0.0
    arrivals: list[Arrival] = field(default_factory=list)
    output_tokens: int | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    done: bool = False
    error: str = ""

    def take(self, event: Event, now: float, *, chat: bool) -> None:
        """Enter one event. Raises ResponseError for an error frame, MsgspecError for one that is no chunk."""
        if event.data == DONE:
            self.done = True
            return
        chunk = msgspec.json.decode(event.data, type=Chunk)
        if chunk.error is not None or event.name == "error":
            raise ResponseError(f"error frame: {event.data[:SHOWN_ERROR_BYTES].decode('utf-8', 'replace')}")
        if chunk.usage is not None:
            self.output_tokens = chunk.usage.completion_tokens
            self.prompt_tokens = self.prompt_tokens or chunk.usage.prompt_tokens
            if chunk.usage.prompt_tokens_details is not None:
                self.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens or 0
        if chunk.choices:
            choice = chunk.choices[0]
            self.finish_reason = choice.finish_reason or self.finish_reason
            tokens = chunk.usage.completion_tokens if chunk.usage is not None else None
            self.arrivals.append(Arrival(time=now, tokens=tokens, text=choice.content))
        if chunk.choices or chat:  # vLLM's end-to-end latency takes the usage event in for chat only
            self.last = now

    def check(self, *, exact: bool) -> None:
        """Raises ResponseError unless the stream was whole; `exact`: with all tokens that were asked for."""
        if not self.done:
            raise ResponseError("truncated: the stream ended without [DONE]")
        if not self.arrivals:
            raise ResponseError("no event had any choices")
        if self.finish_reason not in ("stop", "length"):
            raise ResponseError(f"finish_reason is {self.finish_reason}")
        if self.output_tokens is None:
            raise ResponseError("no event had usage, so its tokens cannot be counted")
        if self.output_tokens > self.asked_tokens or (exact and self.output_tokens != self.asked_tokens):
            raise ResponseError(f"wrong length: {self.output_tokens} tokens, {self.asked_tokens} were asked for")


class Server:
    """An OpenAI server. Each request has a connection of its own, opened before its clock starts."""

    def __init__(self, base_url: str, *, timeout: float) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None:
            raise UsageError("--base-url must be http://host:port or https://host:port", found=base_url)
        self.url, self.timeout = base_url.rstrip("/").removesuffix("/v1"), timeout
        self.host, self.tls = url.hostname, url.scheme == "https"
        self.port = url.port or (443 if self.tls else 80)
        self._path = urlsplit(self.url).path
        self._fixed = f"Host: {url.netloc.rpartition('@')[2]}\r\nConnection: close\r\nAccept: */*\r\n"
        if key := env.read_str("NYBBLE_API_KEY"):
            self._fixed += f"Authorization: Bearer {key}\r\n"

    async def call(self, path: str, body: object = None) -> Any:
        """The JSON that GET, or POST with a body, gives. Raises NybbleError."""
        try:
            async with asyncio.timeout(self.timeout), self._exchange(path, body) as (_, status, pieces):
                content = b"".join([piece async for piece in pieces])
            if status != 200:
                raise ResponseError(_refusal(status, content))
            return msgspec.json.decode(content)
        except (*FAILURES, ResponseError) as error:
            raise NybbleError(f"{self.url}{path} failed", found=_words(error), fix="is the server running?") from error

    async def complete(self, path: str, body: object, record: Record, *, exact: bool) -> None:
        """Stream one completion into `record`; what goes wrong is in its `error`."""
        chat, decoder = path.endswith("/chat/completions"), EventDecoder()
        try:
            async with asyncio.timeout(self.timeout), self._exchange(path, body) as (sent, status, pieces):
                record.sent = sent
                if status != 200:
                    raise ResponseError(_refusal(status, b"".join([piece async for piece in pieces])))
                async for piece in pieces:
                    now = time.perf_counter()
                    for event in decoder.feed(piece):
                        record.take(event, now, chat=chat)
                    if record.done:
                        break
            record.check(exact=exact)
        except (*FAILURES, ResponseError) as error:
            record.error = _words(error)

    @asynccontextmanager
    async def _exchange(self, path: str, body: object) -> AsyncIterator[tuple[float, int, AsyncIterator[bytes]]]:
        """Send a request; yields (when it was sent, status, pieces of the answer's body)."""
        content = b"" if body is None else msgspec.json.encode(body)
        head = f"{'GET' if body is None else 'POST'} {self._path}{path} HTTP/1.1\r\n{self._fixed}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls or None)
        try:
            sent = time.perf_counter()
            writer.write(head.encode("latin-1") + b"\r\n" + content)
            await writer.drain()
            status, headers = await _read_head(reader)
            async with aclosing(_read_body(reader, headers)) as pieces:
                yield sent, status, pieces
        finally:
            writer.close()
            with suppress(OSError):  # the other side may have reset it
                await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case. Raises ValueError or EOFError."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].partition(" ")[2][:3])
    pairs = (line.partition(":") for line in lines[1:] if line)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    """Pieces of a body as they come. Raises EOFError when it is cut short, ValueError when malformed."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            piece = await reader.read(min(left, READ_BYTES))
            if not piece:
                raise EOFError("the answer was cut off")
            left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(READ_BYTES):
            yield piece


def _refusal(status: int, content: bytes) -> str:
    return f"HTTP {status}: {content[:SHOWN_ERROR_BYTES].decode('utf-8', 'replace')}"


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "truncated: the connection was closed before the answer ended"
    return str(error) if isinstance(error, ResponseError) else f"{type(error).__name__}: {error}".rstrip(": ")
