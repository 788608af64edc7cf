"""What crosses between a front end and an EngineCore in another process: a closed union, msgpack, never pickle."""

from __future__ import annotations

import msgspec

from ...plugins import errors
from ...plugins.errors import NybbleError
from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..layer_report import AttentionReport, LayerReport
from ..metrics import StepStats
from ..plan import KVCacheLayout
from ..request import EngineCoreOutput, EngineCoreRequest

MAX_MESSAGE_BYTES = 256 * 2**20


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message to the process: become this engine."""

    config: EngineConfig


class Add(msgspec.Struct, frozen=True, tag="add"):
    requests: list[EngineCoreRequest]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    call_id: int


class AskExperts(msgspec.Struct, frozen=True, tag="ask_experts"):
    """What was counted of every expert; `reset` begins anew after it."""

    call_id: int
    reset: bool


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded and warm."""

    layout: KVCacheLayout
    layers: tuple[LayerReport, ...] = ()
    attention: AttentionReport | None = None


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    outputs: list[EngineCoreOutput]
    stats: StepStats


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    call_id: int
    value: bool


class ExpertReply(msgspec.Struct, frozen=True, tag="expert_reply"):
    call_id: int
    value: list[ExpertCounts]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The process cannot start or go on: the error's class name (a NybbleError or not) and its whole message."""

    kind: str
    message: str

    def as_error(self) -> NybbleError:
        """The same error on this side; one that nybble does not raise on purpose becomes EngineDeadError."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, NybbleError):
            return known(self.message)
        return errors.EngineDeadError(f"the engine stopped on {self.kind}: {self.message}")


ToCore = Start | Add | Abort | ResetPrefixCache | AskExperts | Shutdown
FromCore = Ready | Outputs | Reply | ExpertReply | Failed
