"""Load on an OpenAI server: when requests are due, what they ask, and the records of what came back."""

from __future__ import annotations

import asyncio
import string
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..engine.args import setting
from ..plugins.errors import NybbleError, UsageError
from .client import Record, Server
from .workload import Rng, make_rng, random_lengths

ENDPOINTS = {"/v1/completions": "openai", "/v1/chat/completions": "openai-chat"}
LETTERS = np.array(list(string.ascii_lowercase + " "))
TOKENIZE_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """The load; flags have vLLM's names and defaults."""

    base_url: str = setting("http://127.0.0.1:8000", "the server", group="benchmark")
    endpoint: str = setting("/v1/completions", "what is asked", group="benchmark", choices=tuple(ENDPOINTS))
    model: str | None = setting(None, "model name (default: the server's first)", group="benchmark")
    num_prompts: int = setting(1000, "requests", group="benchmark", low=1)
    request_rate: str = setting("inf", "requests per second; inf sends all at once", group="benchmark")
    burstiness: float = setting(
        1.0,
        "shape of the gamma distribution of gaps: 1 is Poisson, less is burstier",
        group="benchmark",
        above=0,
    )
    max_concurrency: int | None = setting(None, "most requests in flight", group="benchmark", low=1)
    random_input_len: int = setting(1024, "prompt tokens of a request", group="benchmark", low=1)
    random_output_len: int = setting(128, "output tokens of a request", group="benchmark", low=1)
    random_range_ratio: float = setting(
        0.0, "lengths are uniform within this share of the two above", group="benchmark", low=0, high=1
    )
    ignore_eos: bool = setting(True, "generate to the full length; any other length is a failure", group="benchmark")
    temperature: float | None = setting(None, "temperature (default: the server's)", group="benchmark", low=0)
    num_warmups: int = setting(0, "requests before the run, besides the one that tests it", group="benchmark", low=0)
    percentile_metrics: list[str] = setting(  # noqa: RUF009
        [], "of ttft, tpot, itl and e2el, which to report [default: ttft,tpot,itl]", group="benchmark"
    )
    metric_percentiles: list[str] = setting([], "percentiles to report [default: 99]", group="benchmark")  # noqa: RUF009
    seed: int = setting(0, "draws prompts, lengths and arrivals", group="benchmark")
    timeout: float = setting(3600.0, "seconds until a request has failed", group="benchmark", above=0)


class Prompt(NamedTuple):
    """Text, and its length in tokens; 0 when the server cannot tell before it is asked."""

    text: str
    tokens: int


class Outcome(NamedTuple):
    """All records in the order of arrival, seconds of wall and of this process's CPU, and the model's card."""

    records: list[Record]
    seconds: float
    cpu_seconds: float
    card: dict[str, Any]


def arrival_times(rng: Rng, count: int, rate: float, burstiness: float) -> list[float]:
    """Seconds from the start at which requests are due, ascending; the last is at count / rate.

    Gaps are gamma distributed with shape `burstiness`, then scaled so that their sum is what the rate asks
    (vLLM's `bench serve`): two seeds give the same load.
    """
    if rate == float("inf"):
        return [0.0] * count
    due = np.cumsum(rng.gamma(burstiness, 1.0, count))
    # with a shape near 0 every gap may round to 0
    return (due / due[-1] * (count / rate)).tolist() if due[-1] > 0 else [count / rate] * count


async def run(args: ServeArgs, rate: float) -> Outcome:
    """Send everything, `rate` requests a second. Raises NybbleError when not even a test request succeeds."""
    server, rng = Server(args.base_url, timeout=args.timeout), make_rng(args.seed)
    cards = (await server.call("/v1/models"))["data"]
    card = next((c for c in cards if args.model in (None, c["id"])), None)
    if card is None:
        raise UsageError(f"the server has no model {args.model}", known=[c["id"] for c in cards])
    input_lens = random_lengths(rng, args.num_prompts, args.random_input_len, args.random_range_ratio)
    output_lens = random_lengths(rng, args.num_prompts, args.random_output_len, args.random_range_ratio)
    prompts = await make_prompts(server, card["id"], rng, input_lens)
    due = arrival_times(rng, args.num_prompts, rate, args.burstiness)

    async def complete(prompt: Prompt, output_len: int, planned: float) -> Record:
        record = Record(prompt_tokens=prompt.tokens, asked_tokens=output_len, planned=planned)
        body = request_body(args, card["id"], prompt.text, output_len)
        await server.complete(args.endpoint, body, record, exact=args.ignore_eos)
        return record

    # a prompt of its own, so that the first one measured is not found in the prefix cache
    test = await make_prompts(server, card["id"], rng, [args.random_input_len] * (1 + args.num_warmups))
    for warm_up in test:
        if (record := await complete(warm_up, args.random_output_len, 0.0)).error:
            raise NybbleError("the test request before the run failed", found=record.error)

    seats = asyncio.Semaphore(args.max_concurrency) if args.max_concurrency else nullcontext()
    start, cpu_start = time.perf_counter(), time.process_time()

    async def at(i: int) -> Record:
        await asyncio.sleep(max(0.0, start + due[i] - time.perf_counter()))
        async with seats:
            return await complete(prompts[i], output_lens[i], start + due[i])

    records = await asyncio.gather(*(at(i) for i in range(args.num_prompts)))
    return Outcome(records, time.perf_counter() - start, time.process_time() - cpu_start, card)


def request_body(args: ServeArgs, model: str, text: str, output_len: int) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": text}], "max_completion_tokens": output_len}
    if ENDPOINTS[args.endpoint] == "openai":
        asked = {"prompt": text, "max_tokens": output_len}
    extra: dict[str, Any] = {} if args.temperature is None else {"temperature": args.temperature}
    return {
        "model": model,
        **asked,
        **extra,
        "ignore_eos": args.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def make_prompts(server: Server, model: str, rng: Rng, lengths: list[int]) -> list[Prompt]:
    """Random letters, cut by the server's own tokenizer to `lengths` tokens, or to as many letters."""
    at_once = asyncio.Semaphore(TOKENIZE_AT_ONCE)

    async def tokens_of(text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return (await server.call("/tokenize", body))["tokens"]

    async def cut(length: int, letters: Rng) -> Prompt:
        async with at_once:
            text, tokens = "", list[int]()
            while len(tokens) < length:
                text += "".join(letters.choice(LETTERS, length))
                tokens = await tokens_of(text)
            found = await server.call("/detokenize", {"model": model, "tokens": tokens[:length]})
            return Prompt(found["prompt"], length)

    try:
        await tokens_of("a")
    except NybbleError:
        print(
            "the server has no /tokenize: prompts have as many letters as they should have tokens",
            file=sys.stderr,
        )
        return [Prompt("".join(rng.choice(LETTERS, length)), 0) for length in lengths]
    # a generator each: answers come in any order
    return await asyncio.gather(*map(cut, lengths, rng.spawn(len(lengths))))
