"""The public door of nybble: names resolve on first use, so `import nybble` imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine._version import __version__
    from .engine.args import EngineArgs
    from .engine.async_llm import AsyncLLM
    from .engine.llm import LLM
    from .engine.llm_engine import LLMEngine
    from .engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
    from .plugins.errors import NybbleError
    from .plugins.hookspecs import hookimpl

_WHERE = {
    "AsyncLLM": "engine.async_llm",
    "CompletionOutput": "engine.request",
    "EngineArgs": "engine.args",
    "LLM": "engine.llm",
    "LLMEngine": "engine.llm_engine",
    "Logprob": "engine.request",
    "NybbleError": "plugins.errors",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.request",
    "__version__": "engine._version",
    "hookimpl": "plugins.hookspecs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "Logprob",
    "NybbleError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
