"""`nybble plugins list | show`: what is installed, what it provides, and why something is not there."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ...plugins import log
from ...plugins.discover import HOOKS
from ...plugins.errors import PluginError, UsageError, did_you_mean
from ...plugins.manager import PluginHost, PluginInfo

STYLES = {"loaded": "green", "failed": "bold red", "blocked": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to the parser of `nybble plugins`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--prefer", action="append", default=[], metavar="KIND:NAME=PLUGIN",
                        help="settle a name conflict")
    common.add_argument("--strict-plugins", action="store_true", help="exit with code 6 when a plugin failed")
    commands = parser.add_subparsers(dest="plugins_command", metavar="COMMAND", required=True,
                                     prog=parser.prog)
    listing = commands.add_parser("list", parents=[common], help="every plugin, its status, what it provides")
    listing.add_argument("--hook", metavar="NAME", help="only plugins that implement this hook")
    show = commands.add_parser("show", parents=[common], help="all that is known of one plugin")
    show.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Print what was asked. Returns 0, or 6 when a plugin failed and --strict-plugins is set.

    Raises UsageError for an unknown hook, PluginError for an unknown plugin or a wrong --prefer.
    """
    log.configure()
    host = PluginHost.load(prefer=args.prefer)
    show = args.plugins_command == "show"
    chosen = _named(host, args.name) if show else _with_hook(host, args.hook)
    if args.json:
        print(json.dumps([asdict(info) for info in chosen], indent=2))
    elif show:
        print("\n\n".join(_describe(host, info) for info in chosen))
    else:
        _print_table(host, chosen)
    return PluginError.exit_code if args.strict_plugins and any(p.status == "failed" for p in chosen) else 0


def _named(host: PluginHost, name: str) -> list[PluginInfo]:
    """The plugins of one name: several when two distributions chose the same."""
    known = {info.name for info in host.plugins}
    if name not in known:
        raise PluginError(f"there is no plugin {name!r}", known=sorted(known), fix=did_you_mean(name, known))
    return [info for info in host.plugins if info.name == name]


def _with_hook(host: PluginHost, hook: str | None) -> list[PluginInfo]:
    if hook is not None and hook not in HOOKS:
        raise UsageError(f"--hook: there is no hook {hook!r}", known=HOOKS, fix=did_you_mean(hook, HOOKS))
    return [info for info in host.plugins if hook is None or hook in info.hooks]


def _provides(host: PluginHost, info: PluginInfo) -> list[str]:
    """What a plugin offers, with the winner's name on what another plugin overrides."""
    if info.status != "loaded":
        return list(info.provides)
    owners = {key: host.owner(*key.split(":", 1)) for key in info.provides}
    return [key if owner == info.name else f"{key} (overridden by {owner})" for key, owner in owners.items()]


def _describe(host: PluginHost, info: PluginInfo) -> str:
    rows = {
        "plugin": f"{info.name} {info.version}",
        "status": info.status,
        "module": info.module,
        "package": info.distribution or "none (given by the program)",
        "hooks": ", ".join(info.hooks) or "none",
        "provides": ", ".join(_provides(host, info)) or "nothing",
        "digest": info.digest or "none",
        "load time": f"{info.load_seconds * 1000:.1f} ms",
        "reason": info.reason,
    }
    text = "\n".join(f"{label + ':':<11}{value}" for label, value in rows.items() if value is not None)
    return f"{text}\n\n{info.traceback.rstrip()}" if info.traceback else text


def _print_table(host: PluginHost, chosen: list[PluginInfo]) -> None:
    # rich costs 40 ms; only a table needs it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("plugin", "version", "status", "provides", box=None, pad_edge=False)
    table.add_column("load ms", justify="right")
    for info in chosen:
        provides = "\n".join(_provides(host, info))
        cells = (info.name, info.version, Text(info.status, STYLES[info.status]), provides,
                 f"{info.load_seconds * 1000:.1f}")
        # Text, since a plugin's words are no markup
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    for info in chosen:
        if info.status == "failed":
            console.print(Text(f"\n{info.name} {info.version} failed: {info.reason}"), soft_wrap=True)
