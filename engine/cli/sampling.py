"""What `generate` and `chat` share: flags of SamplingParams, and one loop that streams and aborts cleanly."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from ...plugins.errors import NybbleError
from .parser import Parser

if TYPE_CHECKING:
    from ..llm_engine import LLMEngine
    from ..request import RequestOutput, SamplingParams
    from ..text.input_processor import PromptType

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "stop", "n", "logprobs")


def add_sampling_flags(parser: Parser, *, max_tokens: str) -> None:
    """The flags that both commands have; what is not given is left to the checkpoint's generation_config.

    `max_tokens` says in words what the command itself takes for that one.
    """
    group = parser.add_argument_group("sampling", "unset: what the checkpoint's generation_config says")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=SUPPRESS,
        metavar="N",
        help=f"most tokens to write [default: {max_tokens}]",
    )
    group.add_argument(
        "--temperature", type=float, default=SUPPRESS, metavar="X", help="0 takes the likeliest token"
    )
    group.add_argument(
        "--top-p", type=float, default=SUPPRESS, metavar="X", help="sample from this share of probability"
    )
    group.add_argument("--top-k", type=int, default=SUPPRESS, metavar="N", help="sample from the N likeliest")
    group.add_argument(
        "--stop", action="append", default=SUPPRESS, metavar="TEXT", help="end before this text (repeatable)"
    )


def given_sampling(parsed: Namespace, **defaults: Any) -> dict[str, Any]:
    """The SamplingParams fields that flags gave, over the command's own `defaults`."""
    return defaults | {name: value for name, value in vars(parsed).items() if name in SAMPLING}


def stream(
    engine: LLMEngine, requests: Mapping[str, PromptType], params: SamplingParams
) -> Generator[RequestOutput, None, None]:
    """Outputs of the requests {id: prompt} as they come; leaving the loop early aborts what still runs.

    Raises NybbleError when the engine fails a request.
    """
    running = set(requests)
    try:
        for request_id, prompt in requests.items():
            engine.add_request(request_id, prompt, params)
        while running and engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    running.discard(output.request_id)
                failed = next((o.error for o in output.outputs if o.finish_reason == "error"), None)
                if failed is not None:
                    raise NybbleError("the request failed in the engine", found=failed)
                yield output
    finally:
        if running:
            engine.abort_request(sorted(running))
