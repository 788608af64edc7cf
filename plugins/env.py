"""Every NYBBLE_* variable: name, meaning and parser. The only file that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError, nearest

PREFIX = "NYBBLE_"
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    """One variable: its full name and one line of help."""

    name: str
    help: str


VARIABLES: tuple[EnvVar, ...] = (
    EnvVar(name="NYBBLE_LOGGING_LEVEL", help="DEBUG, INFO (default), WARNING or ERROR"),
    EnvVar(name="NYBBLE_LOG_SCHEDULER", help="1 prints one line per scheduler step"),
    EnvVar(name="NYBBLE_TRACE_FUNCTION", help="1 writes every nybble function call to a file per process"),
    EnvVar(name="NYBBLE_PLUGINS", help="unset: all plugins; empty: built-ins only; a,b: built-ins and those"),
    EnvVar(name="NYBBLE_TRACE_PLUGINS", help="1 logs each plugin hook call with its results"),
    EnvVar(name="NYBBLE_API_KEY", help="a key that the server accepts and that `chat --url` sends"),
    EnvVar(name="NYBBLE_CACHE_DIR", help="where generated files are kept (default: the user cache folder)"),
    EnvVar(name="NYBBLE_KERNELS_DIR", help="a folder of kernel libraries from `nybble kernels build --out`"),
    EnvVar(name="NYBBLE_JIT", help="0 forbids compiling kernels when they are first needed"),
    EnvVar(name="NYBBLE_COMPILE_AHEAD", help="0 compiles Triton's kernels one after another, when they are first met"),
    EnvVar(name="NYBBLE_NVCC", help="the CUDA compiler (default: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"),
    EnvVar(name="NYBBLE_TEST_FORCE_PREEMPT", help="probability in [0, 1] of preempting at a step; for tests"),
    EnvVar(name="NYBBLE_STRICT_KV", help="1 checks every KV-cache invariant after each step; for tests"),
)


def read_str(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The raw value of a variable of `VARIABLES`, or None when unset."""
    assert any(v.name == name for v in VARIABLES), f"{name} is not in the table of plugins/env.py"
    return (os.environ if environ is None else environ).get(name)


def read_flag(name: str, environ: Mapping[str, str] | None = None, *, default: bool = False) -> bool:
    """A variable as a switch. Raises UsageError on anything but 0/1/true/false/empty."""
    raw = (read_str(name, environ) or "").strip().lower()
    if raw == "":
        return default
    if raw in ("0", "false"):
        return False
    if raw in ("1", "true"):
        return True
    raise UsageError(f"{name} must be a switch", found=repr(raw), known=["0", "1", "false", "true"])


def read_float(name: str, *, low: float, high: float, environ: Mapping[str, str] | None = None) -> float:
    """A variable as a number in [low, high]; 0.0 when unset. Raises UsageError outside."""
    raw = read_str(name, environ)
    if raw is None:
        return 0.0
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise UsageError(f"{name} must be a number in [{low}, {high}]", found=repr(raw))
    return value


def cache_dir() -> Path:
    """Where generated files are kept: NYBBLE_CACHE_DIR, else the user's cache folder. It need not exist."""
    import platformdirs

    return Path(read_str("NYBBLE_CACHE_DIR") or platformdirs.user_cache_dir("nybble"))


def cuda_homes(environ: Mapping[str, str] | None = None) -> list[str]:
    """Where the CUDA toolkit is said to be, by the names that others read too."""
    environ = os.environ if environ is None else environ
    return [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]


def setting_name(field: str) -> str:
    """The variable that sets an EngineArgs field: `max_model_len` -> `NYBBLE_MAX_MODEL_LEN`."""
    return PREFIX + field.upper()


def read_settings(fields: Iterable[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Raw values of the engine settings that the environment gives, by field name.

    Raises UsageError for a NYBBLE_* name that is neither a setting nor in `VARIABLES`, naming the nearest.
    """
    environ = os.environ if environ is None else environ
    by_name = {setting_name(f): f for f in fields}
    known = {*by_name, *(v.name for v in VARIABLES)}
    found: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX):
            continue
        if name in by_name:
            found[by_name[name]] = value
        elif name not in known:
            guess = nearest(name, known)
            raise UsageError(
                f"unknown environment variable {name}",
                known=None if guess else sorted(known),
                fix=f"did you mean {guess}?" if guess else "unset it",
            )
    return found


def child_environment(import_path: Iterable[str]) -> dict[str, str]:
    """This process's environment for a Python child that must find the same modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, import_path))}


def shown(public: Iterable[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every NYBBLE_* variable that is set, for a report; what may be a secret is hidden.

    `public` are setting fields: their names may hold TOKEN without being one.
    """
    environ = os.environ if environ is None else environ
    harmless = {setting_name(f) for f in public}
    return {
        name: "(hidden)" if name not in harmless and any(word in name for word in SECRET_WORDS) else value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIX)
    }
