"""`nybble serve`: flags to EngineArgs and ServerArgs, then the server."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from ...plugins import env, log
from ...plugins.errors import UsageError
from ..server.args import ServerArgs
from ..settings import flag_entries, read_config_file, read_text
from ..values import merge
from .parser import SERVER_FIELDS, Parser, add_engine_flags, add_settings, engine_args, without_demo


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    server = parser.add_argument_group("server", "where to listen, who may ask, how to stop")
    add_settings(server, ServerArgs)
    server.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="accept this key (repeatable); the process list shows it, unlike --api-key-file's",
    )
    server.add_argument("--api-key-file", metavar="FILE", help="accept the keys in this file, one a line")
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Serve until told to stop; the exit code is the server's."""
    args, _ = engine_args(parsed)
    server = server_args(parsed)
    log.configure()
    if parsed.api_key:
        log.get_logger(__name__).warning(
            "--api-key shows in the process list; --api-key-file and NYBBLE_API_KEY do not"
        )
    from ..server.app import serve

    return serve(without_demo(args), server)


def server_args(parsed: Namespace) -> ServerArgs:
    """The server's settings out of flags and --config, its keys out of flags, file and NYBBLE_API_KEY."""
    given = {name: value for name, value in vars(parsed).items() if name in SERVER_FIELDS}
    entries = flag_entries(given, SERVER_FIELDS)
    if parsed.config:
        entries = read_config_file(Path(parsed.config), SERVER_FIELDS, also_known=None) | entries
    tcp = next((entries[name].spelled for name in ("host", "port") if name in entries), None)
    if "uds" in entries and tcp:
        raise UsageError("a server listens on one address", found=f"{entries['uds'].spelled} and {tcp}")
    server, _ = merge(ServerArgs, entries)
    return replace(server, api_keys=_api_keys(parsed))


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
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError("an API key must be printable ASCII without spaces, and not empty")
    return tuple(dict.fromkeys(keys))
