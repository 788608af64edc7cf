"""`nybble serve`: flags to EngineArgs and ServerArgs, then the server."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from ...plugins import env, log
from ...plugins.errors import UsageError
from ..server.args import ServerArgs, checked_keys
from ..settings import read_text
from ..values import merge
from .parser import Parser, add_engine_flags, add_settings, engine_args, given_entries, without_demo


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    add_server_flags(parser)
    add_engine_flags(parser)


def add_server_flags(parser: Parser) -> None:
    """Every flag of ServerArgs, and those that give keys."""
    server = parser.add_argument_group("server", "where to listen, who may ask, how to stop")
    add_settings(server, ServerArgs, env_names=True)
    server.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="accept this key (repeatable); the process list shows it, unlike --api-key-file's",
    )
    server.add_argument("--api-key-file", metavar="FILE", help="accept the keys in this file, one a line")


def run(parsed: Namespace) -> int:
    """Serve until told to stop; the exit code is the server's."""
    args, _ = engine_args(parsed)
    server, _ = server_args(parsed)
    log.configure()
    if parsed.api_key:
        log.get_logger(__name__).warning(
            "--api-key shows in the process list; --api-key-file and NYBBLE_API_KEY do not"
        )
    from ..server.app import serve

    return serve(without_demo(args), server)


def server_args(parsed: Namespace) -> tuple[ServerArgs, dict[str, str]]:
    """The server's settings, and where each came from; its keys are of flags, file and NYBBLE_API_KEY.

    Raises UsageError.
    """
    entries = given_entries(parsed)
    server, origins = merge(ServerArgs, entries)
    tcp = next((entries[name].spelled for name in ("host", "port") if name in entries), None)
    if server.uds is not None and tcp:
        raise UsageError("a server listens on one address", found=f"{entries['uds'].spelled} and {tcp}")
    return replace(server, api_keys=_api_keys(parsed)), origins


def _api_keys(parsed: Namespace) -> tuple[str, ...]:
    keys = list(parsed.api_key)
    if parsed.api_key_file:
        lines = read_text(Path(parsed.api_key_file), "--api-key-file").split()
        if not lines:
            # an empty file must not mean that everybody may ask
            raise UsageError("--api-key-file holds no key", found=parsed.api_key_file)
        keys += lines
    if (variable := env.read_str("NYBBLE_API_KEY")) is not None:
        keys.append(variable)
    return checked_keys(keys)
