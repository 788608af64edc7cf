"""`nybble completion SHELL`: a static completion script made by shtab."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module

from ...plugins.errors import UsageError, did_you_mean
from ..args import setting_fields
from . import VERBS
from .parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh, tcsh, fish or powershell")


def run(parsed: Namespace) -> int:
    """Print the script, to be sourced or put where the shell looks."""
    import shtab

    if parsed.shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(
            f"no completion for shell {parsed.shell!r}",
            known=shtab.SUPPORTED_SHELLS,
            fix=did_you_mean(parsed.shell, shtab.SUPPORTED_SHELLS),
        )
    print(shtab.complete(whole_parser(), parsed.shell))
    return 0


def whole_parser() -> Parser:
    """Every built-in command in one tree, with what shtab needs to complete values."""
    import shtab

    root = Parser(prog="nybble")
    commands = root.add_subparsers(dest="command")
    for name, verb in VERBS.items():
        parser = commands.add_parser(name, help=verb.help)
        if verb.module:
            import_module(f".{verb.module}", __package__).add_arguments(parser)
        else:
            parser.add_argument("words", nargs="*")
        for action in parser._actions:
            if action.dest in ("model_path", "model", "tokenizer"):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in ("config", "chat_template", "api_key_file"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in setting_fields():
                action.choices = setting_fields()[action.dest].metadata["choices"]
            elif verb.words and not action.option_strings:
                action.choices = verb.words
    return root
