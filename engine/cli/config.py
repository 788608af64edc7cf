"""`nybble config show`: every setting of `nybble serve`, its effective value and where that came from."""

from __future__ import annotations

import json
from argparse import Namespace

from ...plugins.errors import UsageError
from .parser import Parser, add_engine_flags, engine_args
from .serve import add_server_flags, server_args


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("action", metavar="show", help="print the table")
    parser.add_argument("--json", action="store_true", help="a list of {name, value, origin}")
    add_server_flags(parser)
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Print the table, without API keys; no weights are read."""
    if parsed.action != "show":
        raise UsageError(f"nybble config cannot {parsed.action!r}", known=["show"])
    from ..demo import resolve_demo
    from ..explain import Setting, explain

    args, origins = engine_args(parsed)
    server, server_origins = server_args(parsed)
    rows = explain(args, origins, resolve_demo(args).create_engine_config())
    rows += [Setting(name, getattr(server, name), origin) for name, origin in server_origins.items()]
    if parsed.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return 0
    table = [("setting", "value", "origin")]
    table += [(r.name, r.value if isinstance(r.value, str) else json.dumps(r.value), r.origin) for r in rows]
    names, values = (max(len(line[column]) for line in table) for column in (0, 1))
    for name, value, origin in table:
        print(f"{name:<{names}}  {value:<{values}}  {origin}")
    return 0
