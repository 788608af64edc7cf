"""What every handler holds: the engine as the server needs it, limits, keys, metrics and the phase."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response

from ..config import EngineConfig
from ..metrics import StepStats
from ..plan import KVCacheLayout
from ..request import RequestOutput, SamplingParams
from .args import ServerArgs
from .auth import ApiKeys
from .errors import ApiError
from .lifecycle import Lifecycle
from .metrics import ServerMetrics

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


CHARACTERS_PER_TOKEN = 16


class Engine(Protocol):
    """The part of `AsyncLLM` that the server uses."""

    config: EngineConfig
    layout: KVCacheLayout | None

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def errored(self) -> bool: ...

    @property
    def is_running(self) -> bool: ...

    def generate(
        self,
        prompt: list[int],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...

    def default_sampling_params(self) -> dict[str, Any]: ...

    def add_stats_listener(self, listener: Callable[[StepStats], None]) -> None: ...

    async def start(self) -> None: ...

    async def shutdown(self, timeout: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may take: bytes and seconds of a head and of a body, seconds of not reading."""

    body_bytes: int = 8 << 20
    head_bytes: int = 64 << 10
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    stalled_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Api:
    """One server: passed to every handler, so that nothing is global."""

    engine: Engine
    args: ServerArgs
    lifecycle: Lifecycle
    metrics: ServerMetrics
    keys: ApiKeys
    limits: Limits
    created: int

    @property
    def model_name(self) -> str:
        return self.engine.config.model.served_model_name

    @property
    def max_characters(self) -> int:
        """Longer prompts are refused before they are tokenized."""
        return CHARACTERS_PER_TOKEN * self.engine.config.model.max_model_len

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError 404 unless the model asked for is the one served (or none is named)."""
        if asked is not None and asked != self.model_name:
            raise ApiError(
                404,
                f"there is no model {asked!r} here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def tokenizer(self) -> Tokenizer:
        """Raises ApiError 400 when the server was started without one."""
        if self.engine.tokenizer is None:
            raise ApiError(
                400, "this server has no tokenizer: send token ids to /v1/completions", code="no_tokenizer"
            )
        return self.engine.tokenizer


def json_response(content: object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), 200, headers, "application/json")
