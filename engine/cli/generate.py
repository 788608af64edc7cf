"""`nybble generate`: complete prompts from flags or stdin, streaming a single one."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import closing
from typing import TYPE_CHECKING

from ...plugins import log
from ...plugins.errors import UsageError
from .parser import Parser, add_engine_flags, engine_args, without_demo
from .sampling import add_sampling_flags, given_sampling, stream

if TYPE_CHECKING:
    from ..llm import LLM
    from ..request import RequestOutput, SamplingParams

MAX_TOKENS = 128


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="prompt (repeatable) [default: stdin]"
    )
    group.add_argument("--n", type=int, default=1, metavar="N", help="completions per prompt [default: 1]")
    group.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    group.add_argument("--logprobs", type=int, default=None, metavar="N", help="with --json: top N per token")
    add_sampling_flags(parser, max_tokens=str(MAX_TOKENS))
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Print the completions. Ctrl-C ends them early and prints what there is."""
    if parsed.logprobs is not None and not parsed.json:
        raise UsageError("--logprobs is printed in JSON only", fix="add --json")
    args, _ = engine_args(parsed)
    prompts = parsed.prompt or [_read_stdin()]
    log.configure(default="WARNING")
    args = without_demo(args)
    from ..llm import LLM
    from ..request import RequestOutputKind

    llm = LLM.from_engine_args(args)
    try:
        streamed = len(prompts) == 1 and parsed.n == 1 and not parsed.json
        kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.CUMULATIVE
        given = given_sampling(parsed, max_tokens=MAX_TOKENS)
        params = llm.get_default_sampling_params().replace(output_kind=kind, **given)
        if streamed:
            _print_stream(llm, prompts[0], params)
        else:
            _print_all(llm, prompts, params, as_json=parsed.json)
    finally:
        llm.shutdown()
    return 0


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UsageError("there is no prompt", fix='-p "Once upon a time", or pipe one into nybble generate')
    text = sys.stdin.read()
    if not text.strip():
        raise UsageError("stdin holds no prompt")
    return text.removesuffix("\n")


def _print_stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """One prompt: text appears as it is made."""
    try:
        with closing(stream(llm.llm_engine, {"0": prompt}, params)) as outputs:
            for output in outputs:
                print(output.outputs[0].text, end="", flush=True)
    finally:
        print(flush=True)


def _print_all(llm: LLM, prompts: list[str], params: SamplingParams, *, as_json: bool) -> None:
    """Several completions: in the order of the prompts, at the end."""
    requests = {str(i): prompt for i, prompt in enumerate(prompts)}
    latest: dict[str, RequestOutput] = {}
    try:
        with closing(stream(llm.llm_engine, requests, params)) as outputs:
            for output in outputs:
                _merge(latest, output)
    finally:
        for request_id in sorted(latest, key=int):
            _print_one(latest[request_id], as_json, headed=len(prompts) * params.n > 1)


def _merge(latest: dict[str, RequestOutput], output: RequestOutput) -> None:
    """Keep the newest of each completion: an output has only those that the step changed."""
    held = latest.get(output.request_id)
    completions = {c.index: c for part in (held, output) if part for c in part.outputs}
    output.outputs = [completions[index] for index in sorted(completions)]
    latest[output.request_id] = output


def _print_one(output: RequestOutput, as_json: bool, *, headed: bool) -> None:
    if as_json:
        import msgspec

        print(msgspec.json.encode(output).decode())
        return
    for completion in output.outputs:
        if headed:
            print(f"--- prompt {int(output.request_id) + 1}, completion {completion.index + 1}")
        print(completion.text)
