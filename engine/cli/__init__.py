"""The `nybble` command: find the verb, run it, turn errors into messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...plugins.errors import NybbleError, UsageError, did_you_mean

if TYPE_CHECKING:
    from .parser import Parser

INTERNAL, INTERRUPTED, PIPE_CLOSED = 70, 130, 141
TRACEBACK = "--traceback"


class Verb(NamedTuple):
    """A command that `nybble --help` lists without importing it.

    `module` beside this file has `add_arguments(parser)` and `run(parsed) -> exit code`; None means that
    a plugin, the built-in one perhaps, adds the command through `nybble_cli`: a function argv -> exit code.
    `words` is what may come first, for shells to complete.
    """

    usage: str
    help: str
    module: str | None
    words: tuple[str, ...] = ()


VERBS = {
    "serve": Verb("[MODEL] [flags]", "serve a model over the OpenAI API", "serve"),
    "generate": Verb("[MODEL] -p TEXT [flags]", "complete prompts", "generate"),
    "demo": Verb("[--form FORM]", "see the embedded toy model answer, and its experts at work", "demo"),
    "chat": Verb("[MODEL] [flags]", "talk to a model, here or with --url on a server", "chat"),
    "bench": Verb(
        "KIND [flags]",
        "measure kernels, latency, throughput and serving",
        None,
        ("latency", "throughput", "offline", "serve", "transformers", "kernels", "methods", "moe", "step", "idle",
         "load", "startup", "compare"),
    ),
    "eval": Verb("[MODEL] [--reference REF]", "score a checkpoint, and compare it with a reference", None),
    "inspect": Verb("[MODEL] [flags]", "what a checkpoint holds and what would keep it from loading", "inspect"),
    "plan": Verb("MODEL --gpu GPU [flags]", "what a model will take of a device's memory, without loading it", "plan"),
    "experts": Verb("[MODEL] -p TEXT | --url URL", "how often every expert of a model is chosen", "experts"),
    "plugins": Verb("list | show NAME", "what is installed, what it provides, what failed", "plugins"),
    "kernels": Verb("list | build | why OP [flags]", "where compiled kernels come from, and building them", "kernels"),
    "config": Verb("show [MODEL] [flags]", "every setting, its value and where that came from", "config", ("show",)),
    "env": Verb("[--json]", "describe this machine and installation, for a bug report", "env"),
    "completion": Verb(
        "SHELL",
        "print a shell completion script",
        "completion",
        ("bash", "zsh", "tcsh", "fish", "powershell"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: see plugins/errors.py; 70 for what we did not foresee."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = TRACEBACK in _before_dashes(words)
    _mend_streams()
    try:
        code = _exit_code(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        unwritable = _drop_broken_stdout()
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        told = NybbleError("cannot write to stdout", found=error) if unwritable else error
        return _report(told, traceback=traceback)
    except Exception as error:
        return _report(error, traceback=traceback)


def _before_dashes(words: list[str]) -> list[str]:
    """The words up to a bare --, after which nothing is an option."""
    return words[: words.index("--")] if "--" in words else words


def _mend_streams() -> None:
    """Let any text be printed in any locale, and stand in for streams that were closed before we started."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  until the process ends
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_broken_stdout() -> bool:
    """Whether stdout fails; it is then replaced, so that the interpreter does not complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _exit_code(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _report(error: Exception, *, traceback: bool) -> int:
    """Print an error and return its exit code."""
    if traceback:
        from traceback import print_exception

        print_exception(error)
    if isinstance(error, NybbleError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
    if not traceback:
        print("  fix:   run it again with --traceback, and report what it prints", file=sys.stderr)
    return INTERNAL


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(root_parser().topic_help("all"), end="")
        return 0
    name, *rest = words
    if name == TRACEBACK:
        return _dispatch(rest)
    if name in ("-V", "--version"):
        from .._version import __version__

        print(f"nybble {__version__}")
        return 0
    if name.startswith("-"):
        raise UsageError(f"nybble: unknown flag {name}", known=["--help", "--version", TRACEBACK])
    verb = VERBS.get(name)
    if verb is None or verb.module is None:
        # a plugin's command need not know our flag
        options = _before_dashes(rest)
        return _plugin_command(name)([w for w in options if w != TRACEBACK] + rest[len(options) :])
    module = import_module(f".{verb.module}", __name__)
    parser = verb_parser(name)
    module.add_arguments(parser)
    code: int = module.run(parser.parse(rest))
    return code


def _plugin_command(name: str) -> Callable[[list[str]], int]:
    from ...plugins.manager import PluginHost

    host = PluginHost.load()
    added = [command.name for command in host.cli_commands()]
    if name in added:
        command: Callable[[list[str]], int] = host.resolve("command", name)
        return command
    known = sorted({*VERBS, *added})
    absent = "; ".join(f"plugin {p.name!r} is {p.status}: {p.cause}" for p in host.plugins if p.status != "loaded")
    raise UsageError(f"nybble has no command {name!r}", found=absent or None, known=known,
                     fix=did_you_mean(name, known))


def verb_parser(name: str) -> Parser:
    """The parser of a verb, still without its arguments."""
    from .parser import Parser

    verb = VERBS[name]
    about = verb.help[0].upper() + verb.help[1:] + "."
    return Parser(prog=f"nybble {name}", usage=f"nybble {name} {verb.usage}", description=about)


def root_parser() -> Parser:
    """A parser that only prints the page of `nybble --help`."""
    from .parser import Parser

    parser = Parser(
        prog="nybble",
        usage="nybble COMMAND [arguments]",
        description="An LLM inference engine for quantized and mixture-of-experts checkpoints. "
        "Plugins may add commands: nybble plugins list.",
    )
    commands = parser.add_argument_group("commands (nybble COMMAND --help says more)")
    for name, verb in VERBS.items():
        commands.add_argument(name, help=verb.help)
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    return parser
