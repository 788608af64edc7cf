"""One logger for the whole package, configured by the entry points and left alone by the library."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from . import env
from .errors import UsageError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: pass `__name__`."""
    return logging.getLogger(name)


def configure(*, prefix: str = "", default: str = "INFO") -> None:
    """Send nybble's log to stderr at NYBBLE_LOGGING_LEVEL; start the call trace if it was asked for.

    Called by entry points (CLI, engine process), never on import: a library must not take over its host's logging.
    Raises UsageError on an unknown level.
    """
    level = (env.read_str("NYBBLE_LOGGING_LEVEL") or default).upper()
    if level not in LEVELS:
        raise UsageError("NYBBLE_LOGGING_LEVEL is not a level", found=repr(level), known=LEVELS)
    logger = logging.getLogger("nybble")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    if env.read_flag("NYBBLE_TRACE_FUNCTION"):
        logger.warning("tracing every nybble call to %s; this is slow", start_function_trace())


def start_function_trace() -> Path:
    """Write each call into nybble to a file of this process (NYBBLE_TRACE_FUNCTION) and return its path."""
    path = Path(tempfile.mkdtemp(prefix="nybble-trace-")) / f"{os.getpid()}.log"
    out = path.open("w", buffering=1)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("nybble."):
            code = frame.f_code
            out.write(f"{time.time():.6f} {threading.get_ident()} {frame.f_globals['__name__']}.{code.co_qualname}\n")
        return None

    sys.settrace(trace)
    threading.settrace(trace)
    return path
