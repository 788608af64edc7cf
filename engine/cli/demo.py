"""`nybble demo`: three questions to the embedded toy model, its answers beside the right ones, its experts at work."""

from __future__ import annotations

from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from ...plugins import log
from ...plugins.errors import UsageError
from ..args import DEMO, DEMO_FORMS
from ..expert_stats import as_heat_map
from .parser import Parser, add_engine_flags, engine_args, without_demo
from .sampling import stream

if TYPE_CHECKING:
    from ...models.demo.tasks import Example

TASKS = ("sum", "sort", "chain")
ANSWER_TOKENS = 64


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    forms = tuple(sorted(set(DEMO_FORMS.values())))
    parser.add_argument("--form", choices=forms, default=DEMO_FORMS[DEMO], help="bfloat16, or quantized by this method")
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Ask, answer and compare; 1 if an answer is wrong."""
    args, _ = engine_args(parsed)
    if args.model != DEMO:
        raise UsageError("the demo has a model of its own", found=args.model, fix="nybble generate MODEL -p TEXT")
    name = f"{DEMO}-{parsed.form}"
    log.configure(default="WARNING")
    args = without_demo(replace(args, model=name, expert_stats=True))
    from ...models.demo.tasks import take  # with torch, which the command line does without until here
    from ..llm import LLM
    from ..request import RequestOutputKind, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, output_kind=RequestOutputKind.DELTA)
    llm = LLM.from_engine_args(args)
    try:
        right, tokenizer = 0, llm.get_tokenizer()
        for example in (take(task, 1)[0] for task in TASKS):
            prompt = tokenizer.apply_chat_template(example.messages) if example.chat_only else example.prompt
            print(f"\n{_asked(example)}", end="", flush=True)
            answer = ""
            with closing(stream(llm.llm_engine, {"0": prompt}, params)) as outputs:
                for output in outputs:
                    answer += output.outputs[0].text
                    print(output.outputs[0].text, end="", flush=True)
            right += answer == example.answer
            print(f"\n{'expected':>10}: {example.answer}" + ("" if answer == example.answer else "   <- not the same"))
        print(f"\n{right} of {len(TASKS)} right. Tokens per expert:\n{as_heat_map(llm.expert_counts())}")
    finally:
        llm.shutdown()
    print(f"\nServe it:  nybble serve {name}")
    return 0 if right == len(TASKS) else 1


def _asked(example: Example) -> str:
    """The question and where the answer begins."""
    return f"{'chat' if example.chat_only else 'prompt':>10}: {example.question}\n{'answer':>10}: "
