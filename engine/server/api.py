"""What every handler holds: the engine as the server needs it, limits, keys, metrics and the phase."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response

from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..layer_report import AttentionReport, LayerReport
from ..metrics import StepStats
from ..plan import KVCacheLayout
from ..request import RequestOutput, SamplingParams
from .args import ServerArgs
from .auth import ApiKeys
from .errors import ApiError
from .expert_metrics import ExpertMetrics
from .lifecycle import Lifecycle
from .metrics import ServerMetrics

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


CHARACTERS_PER_TOKEN = 16


class Engine(Protocol):
    """The part of `AsyncLLM` that the server uses."""

    config: EngineConfig
    layout: KVCacheLayout | None
    layers: tuple[LayerReport, ...]
    attention: AttentionReport | None

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def errored(self) -> bool: ...

    @property
    def is_running(self) -> bool: ...

    @property
    def num_unfinished(self) -> int: ...

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

    async def expert_counts(self, reset: bool = False) -> list[ExpertCounts]: ...

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


class Heartbeat:
    """Whether the engine makes steps while it has work to do.

    Work begins with a request, and ends with a step that leaves none or when every request is gone: that a slow
    reader has not taken its last output yet is not the engine's fault.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self.clock = engine, clock
        self._since, self._has_work = clock(), False
        engine.add_stats_listener(self._on_step)

    def expect(self) -> None:
        """A request is on its way to the engine; from an idle one, a step is awaited from now on."""
        if not (self._has_work and self._engine.num_unfinished):
            self._since, self._has_work = self.clock(), True

    def _on_step(self, stats: StepStats) -> None:
        self._since, self._has_work = self.clock(), stats.num_running + stats.num_waiting > 0

    @property
    def silent_seconds(self) -> float:
        """How long a step has been awaited; 0 while there is nothing to do."""
        return self.clock() - self._since if self._has_work and self._engine.num_unfinished else 0.0


@dataclass(frozen=True, kw_only=True)
class Api:
    """One server: passed to every handler, so that nothing is global. `experts` None: they are not counted."""

    engine: Engine
    args: ServerArgs
    lifecycle: Lifecycle
    metrics: ServerMetrics
    experts: ExpertMetrics | None
    heartbeat: Heartbeat
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
