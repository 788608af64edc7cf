"""The `nybble` command: find the verb, run it, turn errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ...plugins.errors import NybbleError, UsageError, did_you_mean

if TYPE_CHECKING:
    from .parser import Parser

INTERNAL, INTERRUPTED, PIPE_CLOSED = 70, 130, 141


class Verb(NamedTuple):
    """A command that `nybble --help` lists without importing it.

    `module` beside this file has `add_arguments(parser)` and `run(parsed) -> exit code`; None means that
    a plugin, the built-in one perhaps, adds the command through `nybble_cli`: a function argv -> exit code.
    """

    usage: str
    help: str
    module: str | None


VERBS = {
    "serve": Verb("[MODEL] [flags]", "serve a model over the OpenAI API", "serve"),
    "generate": Verb("[MODEL] -p TEXT [flags]", "complete prompts", "generate"),
    "chat": Verb("[MODEL] [flags]", "talk to a model, here or with --url on a server", "chat"),
    "bench": Verb("KIND [flags]", "measure kernels, latency, throughput and serving", None),
    "plugins": Verb("list | show NAME", "what is installed, what it provides, what failed", "plugins"),
    "config": Verb("show [MODEL] [flags]", "every setting, its value and where that came from", "config"),
    "env": Verb("[--json]", "describe this machine and installation, for a bug report", "env"),
    "completion": Verb("SHELL", "print a shell completion script", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: see plugins/errors.py; 70 for what we did not foresee."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [w for w in words if w != "--traceback"]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read us has gone; the interpreter must not complain when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        return _report(error, traceback=traceback)


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
    if name in ("-V", "--version"):
        from .._version import __version__

        print(f"nybble {__version__}")
        return 0
    if name.startswith("-"):
        raise UsageError(f"nybble: unknown flag {name}", known=["--help", "--version", "--traceback"])
    verb = VERBS.get(name)
    if verb is None or verb.module is None:
        return _plugin_command(name)(rest)
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
    raise UsageError(f"nybble has no command {name!r}", known=known, fix=did_you_mean(name, known))


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
    parser.add_argument("--traceback", action="store_true", help="with any command: where an error came from")
    return parser
