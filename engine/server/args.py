"""ServerArgs: every setting of the HTTP server that is not the engine's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...plugins.errors import UsageError
from ..args import setting


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Where to listen, who may ask, and how to stop. Times are in seconds.

    `api_keys` has no flag of its own: keys come from several places, and must not show in a repr.
    """

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network", group="server")
    port: int = setting(8000, "port to listen on (0: any free one)", group="server", low=0, high=65535)
    uds: str | None = setting(None, "Unix socket to listen on, instead of host and port", group="server")
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    shutdown_timeout: float = setting(
        30.0, "seconds that running requests get to end after SIGTERM", group="server", low=0
    )
    sse_keepalive: float = setting(
        0.0, "seconds of silence before a comment is sent on a stream (0: never)", group="server", low=0
    )
    disable_access_log: bool = setting(False, "do not log each request", group="server")
    enable_log_requests: bool = setting(
        False, "log id, prompt length and sampling of each request, and never text", group="server"
    )


def checked_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """API keys without duplicates. Raises UsageError, not naming it, for one that no header could carry."""
    keys = tuple(dict.fromkeys(keys))
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError("an API key must be printable ASCII without spaces, and not empty")
    return keys
