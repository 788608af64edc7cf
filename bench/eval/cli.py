"""`nybble eval`: its flags, the order of its steps, and its exit code."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...engine.args import EngineArgs, setting
from ...engine.cli.parser import Parser, add_engine_flags, add_settings, engine_args, without_demo
from ...plugins import log
from ...plugins.errors import UsageError
from ...plugins.manager import PluginHost
from ..command import read_settings
from ..results import describe_device
from .questions import BOTH, DEMO, HELD_OUT, NONE, TRAIN, Question, demo_questions, read_questions
from .report import SCHEMA, Comparison, Report, TaskScore, limits_exceeded, to_json, write

if TYPE_CHECKING:
    from .passages import Encoded

WORSE = 1


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """What is asked, how much of it is compared, and what is too much."""

    split: str = setting(HELD_OUT, "side of the demo's tasks: what it was never trained on, or what it was",
                         group="evaluation", choices=(HELD_OUT, TRAIN, BOTH))
    count: int = setting(100, "questions of each task and split", group="evaluation", low=1)
    max_tokens: int = setting(16384, "tokens that go through both models' layers", group="evaluation", low=2)
    window: int = setting(512, "tokens of --text that are read at a time", group="evaluation", low=2)
    reference_tasks: bool = setting(True, "the reference answers the tasks too; it then has to fit in memory",
                                    group="evaluation")
    hash: bool = setting(True, "put the SHA-256 of every weight file in the report", group="evaluation")
    max_kl: float | None = setting(None, "exit 1 when the mean KL divergence, in nats, is more", group="evaluation",
                                   low=0)
    max_drop: float | None = setting(
        None, "exit 1 when exact match is more points (of 100) below the reference's", group="evaluation", low=0)


class Pair(NamedTuple):
    """The engine settings of both checkpoints."""

    model: EngineArgs
    reference: EngineArgs | None


def main(argv: list[str]) -> int:
    """Evaluate. 0: within the limits; 1: --max-kl or --max-drop is exceeded."""
    parsed = make_parser().parse(argv)
    args = read_settings(EvalArgs, parsed)
    _check_limits(args, parsed)
    log.configure(default="WARNING")
    report = evaluate(_pair(parsed), args, tasks=parsed.tasks, text=parsed.text, argv=argv)
    from .table import print_report

    print_report(report)
    if parsed.json:
        write(Path(parsed.json), to_json(report))
    if parsed.html:
        from .html import to_html

        write(Path(parsed.html), to_html(report).encode())
    return WORSE if report.failed else 0


def make_parser() -> Parser:
    parser = Parser(
        prog="nybble eval", usage="nybble eval [MODEL] [--reference REF] [flags]",
        description="Score a checkpoint's answers, and compare it with a reference by layer and by expert. Layers are "
                    "compared in float32 unless --dtype says otherwise.",
    )
    group = parser.add_argument_group("evaluation", "what is asked and compared")
    group.add_argument("--reference", metavar="REF", help="checkpoint that MODEL was quantized from")
    group.add_argument("--tasks", metavar="{demo,none,FILE}", default=DEMO,
                       help="questions with one right answer: the demo's, none, or a .jsonl file of objects with task, "
                            "prompt or messages, and answer [default: demo]")
    group.add_argument("--text", metavar="FILE", help="compare over the tokens of this text as well")
    group.add_argument("--json", metavar="FILE", help="write the whole report there")
    group.add_argument("--html", metavar="FILE", help="write it there as one self-contained page")
    add_settings(group, EvalArgs)
    add_engine_flags(parser)
    return parser


def _check_limits(args: EvalArgs, parsed: Namespace) -> None:
    """Raises UsageError for a limit that nothing could exceed, and where there is nothing to do."""
    answered = parsed.tasks != NONE and args.reference_tasks
    for flag, given, possible, fix in (
        ("--max-kl", args.max_kl is not None, parsed.reference, "add --reference"),
        ("--max-drop", args.max_drop is not None, parsed.reference and answered,
         "add --reference, and let it answer --tasks"),
        ("--text", parsed.text is not None, parsed.reference, "add --reference"),
        ("--tasks none", parsed.tasks == NONE, parsed.reference and parsed.text, "add --reference and --text"),
    ):
        if given and not possible:
            raise UsageError(f"{flag} needs something to compare with", fix=fix)


def _pair(parsed: Namespace) -> Pair:
    args, _ = engine_args(parsed)
    reference = None
    if parsed.reference is not None:
        reference = without_demo(replace(args, model=parsed.reference, quantization=None, served_model_name=None,
                                         tokenizer=None))
    return Pair(without_demo(args), reference)


def evaluate(pair: Pair, args: EvalArgs, *, tasks: str = DEMO, text: str | None = None,
             argv: Sequence[str] = ()) -> Report:
    """Ask, compare and stamp. Raises UsageError, CheckpointError."""
    from . import passages, stamp
    from .compare import check_pair, compare
    from .stream import Source, arithmetic

    host = PluginHost.load(prefer=pair.model.prefer, strict=pair.model.strict_plugins)
    sources = [Source(one.create_engine_config(host), host, dtype=arithmetic(one)) for one in pair if one is not None]
    model, reference = sources[0], sources[1] if len(sources) > 1 else None
    if reference is not None:
        check_pair(model, reference)
    if model.tokenizer is None:
        raise UsageError("an evaluation needs the model's tokenizer", fix="leave --skip-tokenizer-init out")
    most = min(source.config.model.max_model_len for source in sources)
    questions = _questions(tasks, args)
    encoded = passages.encode(questions, model.tokenizer, most)
    scores = _ask(pair, args, questions, encoded)
    comparison: Comparison | None = None
    if reference is not None:
        share = args.max_tokens // 2 if text and encoded else args.max_tokens
        read = passages.of_questions(encoded, share)
        if text is not None:
            read += passages.of_text(Path(text), model.tokenizer, min(args.window, most), share)
        if not read:
            raise UsageError("no question fits the model, so there is nothing to compare over",
                             found=f"{len(questions)} questions, a context of {most} tokens, --max-tokens {share}",
                             fix="add --text, or raise --max-tokens")
        comparison = compare(model, reference, read)
    return Report(
        schema=SCHEMA, command=shlex.join(["nybble", "eval", *argv]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=describe_device(model.config.device.device), libraries=stamp.libraries(),
        model=stamp.describe(model, hashes=args.hash),
        reference=None if reference is None else stamp.describe(reference, hashes=args.hash),
        tasks=scores, comparison=comparison,
        failed=limits_exceeded(scores, comparison, max_kl=args.max_kl, max_drop=args.max_drop),
    )


def _questions(tasks: str, args: EvalArgs) -> list[Question]:
    if tasks == NONE:
        return []
    return demo_questions(args.count, args.split) if tasks == DEMO else read_questions(Path(tasks), args.count)


def _ask(pair: Pair, args: EvalArgs, questions: Sequence[Question], encoded: Sequence[Encoded]) -> list[TaskScore]:
    """Let the engine answer, one checkpoint after the other."""
    from .answers import answer, score

    if not encoded:
        return score(questions, encoded, [], None)
    mine = answer(pair.model, encoded)
    reference = pair.reference if args.reference_tasks else None
    return score(questions, encoded, mine, None if reference is None else answer(reference, encoded))
