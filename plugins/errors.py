"""The exceptions nybble raises on purpose.

    NybbleError                 exit 70  anything we can explain
    ├── UsageError              exit 2   a flag, env name, YAML key or argument is wrong
    │   └── RequestError        HTTP 4xx one request is wrong; the engine goes on
    ├── CheckpointError         exit 3   a model folder is refused
    ├── OutOfMemoryError        exit 4   the plan does not fit the device
    ├── PortInUseError          exit 5   another process owns the address
    ├── PluginError             exit 6   a plugin is broken, missing or in conflict
    ├── KernelBuildError        exit 7   a compiled kernel cannot be had here
    └── EngineDeadError         exit 70  the engine process is gone
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The same as a question to end an error with."""
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else None


class NybbleError(Exception):
    """An error that says what was asked, what was found, what is known and how to mend it.

    Args:
        asked: what went wrong, in terms of what the user asked for. One sentence.
        found: what was there instead.
        known: the values that would have been accepted.
        fix: what to do about it.
    """

    exit_code = 70

    def __init__(
        self,
        asked: str,
        *,
        found: object = None,
        known: Iterable[str] | None = None,
        fix: str | None = None,
    ) -> None:
        self.asked, self.found, self.fix = asked, found, fix
        self.known = None if known is None else list(known)
        lines = [asked]
        if found is not None:
            lines.append(f"  found: {found}")
        if self.known is not None:
            lines.append(f"  known: {', '.join(self.known) or '(none)'}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


class UsageError(NybbleError):
    """A setting is wrong, whatever spelling it arrived under."""

    exit_code = 2


class RequestError(UsageError, ValueError):
    """One request is refused; others are untouched.

    `param` names the request field and `code` is the machine-readable reason that the HTTP error object carries.
    """

    def __init__(
        self,
        asked: str,
        *,
        param: str | None = None,
        code: str | None = None,
        found: object = None,
        known: Iterable[str] | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(asked, found=found, known=known, fix=fix)
        self.param, self.code = param, code


class CheckpointError(NybbleError):
    """A model folder cannot be served as it is."""

    exit_code = 3


class OutOfMemoryError(NybbleError):
    """What was asked for does not fit the device's memory."""

    exit_code = 4


class PortInUseError(NybbleError):
    """The address to serve on is taken."""

    exit_code = 5


class PluginError(NybbleError):
    """A plugin is broken, missing, of another API version, or in conflict with another."""

    exit_code = 6


class KernelBuildError(NybbleError):
    """A compiled kernel was asked for and can neither be found nor built here."""

    exit_code = 7


class EngineDeadError(NybbleError):
    """The engine stopped; every waiting request gets this."""
