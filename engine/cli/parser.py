"""Flags from settings classes, errors with the nearest flag, and help that comes in parts."""

from __future__ import annotations

import argparse
import sys
import textwrap
from argparse import SUPPRESS, Action, BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from ...plugins import env
from ...plugins.errors import UsageError, did_you_mean
from ..args import EngineArgs, setting_fields
from ..server.args import ServerArgs
from ..settings import flag_name, read_layers
from ..values import Entry, base_type, merge

ENGINE_GROUPS = {
    "model": "what is served",
    "load": "how weights are read",
    "device": "where it runs",
    "cache": "the KV cache",
    "scheduler": "how a step is filled",
    "parallel": "several devices",
    "plugins": "which plugins take part",
}
SERVER_FIELDS = tuple(f.name for f in fields(ServerArgs) if f.metadata)
METAVARS = {int: "N", float: "X", list: "A,B", dict: "JSON", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """argparse with our errors; groups in `folded` show only their flags' names until asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options, "add_help": False})
        self.folded: set[str] = set()
        self._positionals.title = "arguments"
        self.add_argument(
            "-h",
            "--help",
            nargs="?",
            const="",
            metavar="TOPIC",
            action=_Help,
            help="this page; of a group, of a flag, or all",
        )
        # main reads it; known here so that argparse tells it from a value
        self.add_argument(
            "--traceback", action="store_true", default=SUPPRESS, help="with any command: where an error came from"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", fix=f"see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parse all of `argv`; underscores in flags count as dashes. Raises UsageError."""
        parsed, extra = self.parse_known_args(_dashed(argv))
        if not extra:
            return parsed
        name = extra[0].split("=")[0]
        if not name.startswith("-"):
            raise UsageError(f"{self.prog}: unexpected argument {name!r}", fix="put quotes around spaces")
        raise UsageError(
            f"{self.prog}: unknown flag {name}",
            fix=did_you_mean(name, _flags(self)) or f"see {self.prog} --help=all",
        )

    def topic_help(self, topic: str) -> str:
        """The help page: "" is the short one, "all" the whole, else a group or a flag."""
        wanted = topic.strip().lstrip("-").replace("_", "-").lower()
        groups = {g.title: g for g in self._action_groups if g.title and g._group_actions}
        flags = {s.lstrip("-"): a for s, a in self._option_string_actions.items()}
        formatter = _formatter(self.prog)
        shown, folded = list(groups.values()), []
        if wanted in ("", "all"):
            formatter.add_usage(self.usage, self._actions, [])
            formatter.add_text(self.description)
            if not wanted:
                shown = [g for title, g in groups.items() if title not in self.folded]
                folded = [g for title, g in groups.items() if title in self.folded]
        elif wanted in groups:
            shown = [groups[wanted]]
        elif wanted in flags:
            formatter.add_arguments([flags[wanted]])
            return formatter.format_help()
        else:
            raise UsageError(
                f"{self.prog}: no help on {topic!r}",
                known=[*groups, "all", "or any flag"],
                fix=did_you_mean(wanted, [*groups, *flags]),
            )
        for group in shown:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help() + self._folded_help(folded)

    def _folded_help(self, groups: Sequence[argparse._ArgumentGroup]) -> str:
        if not groups:
            return ""
        lines = ["", f"More flags, by group ({self.prog} --help=GROUP, --help=FLAG or --help=all):"]
        for group in groups:
            names = " ".join(action.option_strings[0] for action in group._group_actions)
            head = f"  {group.title:<10}"
            lines += textwrap.wrap(names, 100, initial_indent=head, subsequent_indent=" " * len(head))
        return "\n".join(lines) + "\n"


class _Help(Action):
    def __call__(
        self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print(parser.topic_help(values), end="")
        parser.exit()


def _formatter(prog: str) -> argparse.HelpFormatter:
    from rich_argparse import RichHelpFormatter

    class Formatter(RichHelpFormatter):
        # our texts hold brackets that are not markup, and our titles are commands and groups to type
        text_markup = False
        help_markup = False
        group_name_formatter = str

    return Formatter(prog, max_help_position=30, width=110)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every flag of a parser and of its subcommands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _flags(sub)


def _dashed(argv: Sequence[str]) -> list[str]:
    """--max_model_len=8k -> --max-model-len=8k; what follows a bare -- is left alone."""
    out: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return out + list(argv[i:])
        name, equals, value = word.partition("=")
        out.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return out


def add_settings(
    group: argparse._ArgumentGroup, cls: type, *, only: str | None = None, env_names: bool = False
) -> None:
    """One flag per field of a settings class, or of its group `only`; values stay text (see values.py)."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if not field.metadata or only not in (None, field.metadata["group"]):
            continue
        base, _ = base_type(hints[field.name])
        choices, alias = field.metadata["choices"], field.metadata["alias"]
        how: dict[str, Any] = {"metavar": METAVARS.get(base)}
        if base is bool:
            how = {"action": BooleanOptionalAction}
        elif base is list:
            how["action"] = "append"
        elif choices:
            how["metavar"] = "{" + ",".join(choices) + "}"
        names = [flag_name(field.name), *([alias] if alias else [])]
        help = _help_line(field, base, env_names)
        group.add_argument(*names, dest=field.name, default=SUPPRESS, help=help, **how)


def _help_line(field: Field[Any], base: type, env_names: bool) -> str:
    notes = []
    if field.default not in (None, MISSING):
        shown = {True: "on", False: "off"}[field.default] if base is bool else field.default
        notes.append(f"default: {shown}")
    if env_names:
        notes.append(env.setting_name(field.name))
    text = field.metadata["help"] + (f" [{', '.join(notes)}]" if notes else "")
    return text.replace("%", "%%")


def add_engine_flags(parser: Parser) -> None:
    """MODEL, --config and every flag of EngineArgs, folded by group."""
    parser.add_argument("model_path", nargs="?", metavar="MODEL", default=SUPPRESS, help="checkpoint folder")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags and NYBBLE_* win")
    for name, description in ENGINE_GROUPS.items():
        group = parser.add_argument_group(name, description)
        add_settings(group, EngineArgs, only=name, env_names=True)
        parser.folded.add(name)


def engine_args(parsed: Namespace) -> tuple[EngineArgs, dict[str, str]]:
    """The engine's settings, and where each came from. Raises UsageError."""
    return merge(EngineArgs, given_entries(parsed))


def given_entries(parsed: Namespace) -> dict[str, Entry]:
    """What flags, environment and --config give of the engine's settings and of the server's.

    Of both, whatever the command: one file and one environment serve them all. Raises UsageError.
    """
    names = [*setting_fields(), *SERVER_FIELDS]
    given = {name: value for name, value in vars(parsed).items() if name in names}
    if "model_path" in parsed:
        if given.get("model", parsed.model_path) != parsed.model_path:
            both = f"{parsed.model_path} and --model {given['model']}"
            raise UsageError("two models are given", found=both)
        given["model"] = parsed.model_path
    return read_layers(given, names, config_file=Path(parsed.config) if parsed.config else None)


def without_demo(args: EngineArgs) -> EngineArgs:
    """`args` with the folder of the demo model, if that is what was asked for; says so on stderr."""
    from ..demo import DEMO_NOTICE, resolve_demo

    resolved = resolve_demo(args)
    if resolved is not args:
        print(DEMO_NOTICE, file=sys.stderr)
    return resolved
