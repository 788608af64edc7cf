"""`nybble experts`: how often every expert is chosen, of a server or of a model that runs prompts here."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ...plugins import env, log
from ...plugins.errors import UsageError
from ..args import setting_fields
from ..expert_stats import ExpertCounts, as_html, as_json, as_table
from ..settings import flag_name
from .client import Client
from .parser import Parser, add_engine_flags, engine_args, without_demo
from .sampling import SAMPLING, add_sampling_flags, given_sampling, stream

MAX_TOKENS = 16


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    group = parser.add_argument_group("what to count")
    group.add_argument("-p", "--prompt", action="append", metavar="TEXT",
                       help="run this prompt (repeatable) [default: stdin, one a line]")
    group.add_argument("--url", metavar="URL", help="ask this server (http://127.0.0.1:8000), started --expert-stats")
    group.add_argument("--api-key", metavar="KEY", help="with --url: the server's key (or NYBBLE_API_KEY)")
    group.add_argument("--reset", action="store_true", help="with --url: begin anew after this account")
    group.add_argument("--json", action="store_true", help="JSON instead of a table")
    group.add_argument("--html", metavar="FILE", help="write a heat map of layers x experts as well")
    add_sampling_flags(parser, max_tokens=str(MAX_TOKENS))
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Print the account. Raises UsageError where nothing is counted."""
    title, layers = _remote(parsed) if parsed.url else _local(parsed)
    print(as_json(layers).decode() if parsed.json else as_table(layers))
    if parsed.html:
        try:
            Path(parsed.html).write_text(as_html(layers, title), encoding="utf-8")
        except OSError as error:
            raise UsageError("--html cannot be written", found=error) from error
    return 0


def _remote(parsed: Namespace) -> tuple[str, list[ExpertCounts]]:
    """The server's name of its model, and what it counted."""
    local = [flag_name(name) for name in vars(parsed) if name in setting_fields() or name in SAMPLING]
    local += [flag_name(name) for name in ("prompt", "config") if getattr(parsed, name)]
    if local or "model_path" in parsed:
        raise UsageError(f"{(local or ['MODEL'])[0]} is for a model that runs here", fix="leave it out with --url")
    client = Client(parsed.url, env.read_str("NYBBLE_API_KEY") if parsed.api_key is None else parsed.api_key)
    return client.first_model(), client.expert_counts(reset=parsed.reset)


def _local(parsed: Namespace) -> tuple[str, list[ExpertCounts]]:
    """The model's name, and what was counted while it ran the prompts."""
    for name in ("reset", "api_key"):
        if getattr(parsed, name):
            raise UsageError(f"{flag_name(name)} is for a server", fix="add --url, or leave it out")
    args, _ = engine_args(parsed)
    prompts = parsed.prompt or _read_lines()
    log.configure(default="WARNING")
    args = without_demo(replace(args, expert_stats=True))
    from ..llm import LLM

    llm = LLM.from_engine_args(args)
    try:
        llm.expert_counts()  # a model without experts is refused before it runs anything
        params = llm.get_default_sampling_params().replace(**given_sampling(parsed, max_tokens=MAX_TOKENS))
        requests = {str(number): prompt for number, prompt in enumerate(prompts)}
        with closing(stream(llm.llm_engine, requests, params)) as outputs:
            for _ in outputs:
                pass
        return llm.llm_engine.config.model.served_model_name, llm.expert_counts()
    finally:
        llm.shutdown()


def _read_lines() -> list[str]:
    if sys.stdin.isatty():
        raise UsageError("there is no prompt", fix='-p "Once upon a time", --url, or pipe prompts in, one a line')
    prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise UsageError("stdin holds no prompt")
    return prompts
