"""Every hook a plugin may implement, and the version of this contract.

A plugin is an entry point in group `nybble` whose module is light (no torch), states `NYBBLE_API = (1, 0)`
and marks functions with `@hookimpl`. Hooks are pure and run once at start-up in every process; tables they
return hold `{name: "module:attribute"}`, resolved on first use. With `NYBBLE_OVERRIDES = ("quant:awq",)` the
module may replace another plugin's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

API_VERSION = (1, 0)
GROUP = "nybble"
Table = dict[str, str]

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

# hook name -> the kind of part its table registers
KINDS: dict[str, str] = {
    "nybble_models": "model",
    "nybble_quants": "quant",
    "nybble_kernels": "kernel",
    "nybble_moe_backends": "moe_backend",
    "nybble_attention_backends": "attention_backend",
    "nybble_executors": "executor",
    "nybble_loaders": "loader",
    "nybble_proposers": "proposer",
    "nybble_logits_processors": "logits_processor",
    "nybble_tool_parsers": "tool_parser",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A plugin's claim on a checkpoint: the quantization method `name`, because of `reason`."""

    name: str
    reason: str


@hookspec
def nybble_models() -> Table:  # type: ignore[empty-body]
    """Architectures, by the name in config.json's `architectures`."""


@hookspec
def nybble_quants() -> Table:  # type: ignore[empty-body]
    """Quantization methods, by the name in `quantization_config.quant_method`."""


@hookspec
def nybble_kernels() -> Table:  # type: ignore[empty-body]
    """Classes derived from `csrc/select.py:LinearKernel`; it chooses among them, layer by layer."""


@hookspec
def nybble_moe_backends() -> Table:  # type: ignore[empty-body]
    """Classes derived from `moe/backend.py:MoEBackend`, by the name that --moe-backend pins."""


@hookspec
def nybble_attention_backends() -> Table:  # type: ignore[empty-body]
    """Classes with the AttentionBackend protocol of `engine/attention/base.py`."""


@hookspec
def nybble_executors() -> Table:  # type: ignore[empty-body]
    """Classes derived from `engine/executor/base.py:Executor`."""


@hookspec
def nybble_loaders() -> Table:  # type: ignore[empty-body]
    """Weight sources, by `--load-format` name."""


@hookspec
def nybble_proposers() -> Table:  # type: ignore[empty-body]
    """Draft token proposers for speculative decoding."""


@hookspec
def nybble_logits_processors() -> Table:  # type: ignore[empty-body]
    """Classes with the LogitsProcessor protocol of `engine/sample/processors.py`."""


@hookspec
def nybble_tool_parsers() -> Table:  # type: ignore[empty-body]
    """Tool-call parsers of the chat server."""


@hookspec
def nybble_detect_quant(hf_config: dict[str, Any], files: Sequence[str]) -> Claim | None:
    """Claim a checkpoint from its config.json and file names. All claims are collected; a tie is an error."""


@hookspec
def nybble_configure(config: dict[str, Any]) -> dict[str, Any] | None:
    """Change engine settings before EngineConfig is made: return {field: value} of what should differ."""


@hookspec
def nybble_step_done(stats: Any) -> None:
    """Observe one engine step (`engine/metrics.py:StepStats`). Called only when someone implements it."""


@hookspec
def nybble_cli(commands: Any) -> None:
    """Add commands: `commands.add(name, help, "module:attribute")` (see `engine/cli`)."""


@hookspec
def nybble_routes(app: Any) -> None:
    """Add HTTP routes to the server: `app.add_route(path, handler, methods)`."""
