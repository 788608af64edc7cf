"""What the benchmark commands share: their flags from a settings class, and what they do with a result."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..engine.cli.parser import Parser, add_engine_flags, add_settings, engine_args, without_demo
from ..engine.settings import flag_entries
from ..engine.values import merge
from ..plugins.errors import UsageError, did_you_mean
from .results import Result, print_result, write_json

if TYPE_CHECKING:
    from ..engine.llm import LLM

T = TypeVar("T")


def make_parser(name: str, settings: type, description: str, *, engine: bool = False) -> Parser:
    """The parser of `nybble bench NAME`: the fields of `settings`, --output-json, perhaps engine flags."""
    model = "[MODEL] " if engine else ""
    parser = Parser(prog=f"nybble bench {name}", usage=f"nybble bench {name} {model}[flags]", description=description)
    group = parser.add_argument_group("benchmark", "what is measured")
    add_settings(group, settings)
    group.add_argument("--output-json", metavar="FILE", help="write the result there, for `nybble bench compare`")
    if engine:
        add_engine_flags(parser)
    return parser


def read_settings(cls: type[T], parsed: Namespace) -> T:
    """The benchmark's settings out of parsed flags. Raises UsageError."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    given = {name: value for name, value in vars(parsed).items() if name in names}
    return merge(cls, flag_entries(given, names))[0]


def start_engine(parsed: Namespace) -> LLM:
    """An engine in this process, from the engine flags. The caller shuts it down."""
    args = without_demo(engine_args(parsed)[0])
    from ..engine.llm import LLM

    return LLM.from_engine_args(args)


def pick(asked: str, known: Mapping[str, T], what: str, *, every: Mapping[str, T] | None = None) -> dict[str, T]:
    """The entries named by a comma-separated list; "all" is all of `every`, or of `known`. Raises UsageError."""
    names = list(known if every is None else every) if asked == "all" else [n.strip() for n in asked.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}", known=known, fix=did_you_mean(name, known))
    return {name: known[name] for name in names}


def publish(result: Result, output_json: str | None) -> None:
    """Print a result, and write it where the user wants it."""
    print_result(result)
    if output_json:
        write_json(Path(output_json), result)


def track(steps: Sequence[T], description: str) -> Iterator[T]:
    """`steps`, with a progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    return iter(bar(steps, description, console=console, transient=True, disable=not console.is_terminal))
