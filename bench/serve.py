"""`nybble bench serve`: load on a running OpenAI server, measured as vLLM's `bench serve` measures it."""

from __future__ import annotations

import asyncio
import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..engine.cli.env import describe
from ..engine.cli.parser import Parser
from ..plugins.errors import UsageError
from .client import Record
from .command import make_parser, read_settings
from .load import ENDPOINTS, ServeArgs, run
from .results import Metric, Result, make_result, write_json
from .serving_metrics import DETAILED, OWN_SECTIONS, VLLM_SECTIONS, latencies, report, summarize

GOODPUT = ("ttft", "tpot", "e2el")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NOT_WORKLOAD = ("base_url", "model", "percentile_metrics", "metric_percentiles", "timeout")


def main(argv: list[str]) -> int:
    """Run the load and report. Exit code 1 when a request failed."""
    parser = make_parser("serve", ServeArgs, "Put load on a running OpenAI server. NYBBLE_API_KEY is sent if set.")
    build(parser)
    parsed = parser.parse(argv)
    args = read_settings(ServeArgs, parsed)
    rate = parse_rate(args.request_rate)
    sections = parse_names(args.percentile_metrics) or ["ttft", "tpot", "itl"]
    percentiles = parse_percentiles(args.metric_percentiles) or [99.0]

    records, seconds, cpu_seconds, card = asyncio.run(run(args, rate))
    found = summarize(
        records,
        seconds,
        goodput=dict(parsed.goodput),
        sections=[*sections, *OWN_SECTIONS],
        percentiles=percentiles,
    )
    found["client_cpu_percent"] = 100 * cpu_seconds / seconds
    found["p99_client_queue_time_ms"] = 1e3 * float(np.percentile(found["queue_times"], 99))
    # of a server elsewhere only its address is known; of one here, that it may use this machine's GPU
    here = urlsplit(args.base_url).hostname in LOOPBACK and describe()["gpus"]
    result = make_result(
        "serve",
        argv,
        model=card["id"],
        toy_model=card.get("demo") is True,
        device="cuda" if here else "cpu",
        workload={name: value for name, value in asdict(args).items() if name not in NOT_WORKLOAD},
        metrics=metrics_of(records, found),
    )
    lines = report(found, request_rate=rate, max_concurrency=args.max_concurrency, percentiles=percentiles)
    print("\n".join(lines))
    for error in sorted({record.error for record in records if record.error})[:10]:
        print(f"failed: {error}", file=sys.stderr)
    paths = [Path(parsed.output_json)] if parsed.output_json else []
    if parsed.save_result or parsed.result_filename:
        name = parsed.result_filename or default_filename(args, rate, result)
        paths.append(Path(parsed.result_dir) / name)
    for path in paths:
        write_json(path, result, vllm_keys(args, rate, result, found, detailed=parsed.save_detailed))
    return 1 if found["failed"] else 0


def build(parser: Parser) -> None:
    """Add the flags that are about the result rather than the load."""
    group = parser.add_argument_group("result")
    group.add_argument(
        "--goodput",
        nargs="+",
        type=service_level,
        default=[],
        metavar="NAME:MS",
        help="count requests within all of these, of ttft, tpot and e2el",
    )
    group.add_argument("--save-result", action="store_true", help="write a JSON file named after the run")
    group.add_argument("--save-detailed", action="store_true", help="with every request's numbers, texts and errors")
    group.add_argument("--result-dir", default=".", metavar="DIR")
    group.add_argument("--result-filename", metavar="FILE")


def service_level(text: str) -> tuple[str, float]:
    """ "ttft:200" as ("ttft", 200.0)."""
    name, _, value = text.partition(":")
    try:
        limit = float(value)
    except ValueError:
        limit = -1.0
    if name not in GOODPUT or not limit >= 0:
        raise ArgumentTypeError(f"{text!r} is not one of {', '.join(GOODPUT)} with milliseconds, such as ttft:200")
    return name, limit


def parse_rate(text: str) -> float:
    """Requests per second, "inf" among them. Raises UsageError."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise UsageError("--request-rate must be a positive number or inf", found=text)
    return rate


def parse_names(names: list[str]) -> list[str]:
    for name in names:
        if name not in VLLM_SECTIONS:
            raise UsageError(f"--percentile-metrics knows no {name!r}", known=VLLM_SECTIONS)
    return names


def parse_percentiles(texts: list[str]) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise UsageError("--metric-percentiles must be numbers", found=error) from error
    if not all(0 <= value <= 100 for value in values):
        raise UsageError("--metric-percentiles must lie in 0 to 100", found=", ".join(texts))
    return values


def metrics_of(records: list[Record], found: dict[str, Any]) -> dict[str, Metric]:
    """The result's metrics: rates of this one run, and latencies over its requests."""
    rates = {"request_throughput": "req/s", "output_throughput": "tok/s", "total_token_throughput": "tok/s"}
    metrics = {name: Metric.of([found[name]], unit, better="higher") for name, unit in rates.items()}
    metrics["failed"] = Metric.of([found["failed"]], "requests", better="lower")
    for name, values in latencies([r for r in records if not r.error]).items():
        if values:
            metrics[name] = Metric.of([1e3 * v for v in values], "ms", better="lower", percentiles=(90, 99))
    return metrics


def vllm_keys(args: ServeArgs, rate: float, result: Result, found: dict[str, Any], *, detailed: bool) -> dict[str, Any]:
    """The keys of vLLM's result file; per request only when `detailed`."""
    backend = ENDPOINTS[args.endpoint]
    return {
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": result.model,
        "tokenizer_id": None,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **{name: value for name, value in found.items() if detailed or name not in DETAILED},
    }


def default_filename(args: ServeArgs, rate: float, result: Result) -> str:
    """vLLM's: backend, rate, concurrency, model and time."""
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    stamp = result.date.replace(":", "").replace("-", "")[:15].replace("T", "-")
    return f"{ENDPOINTS[args.endpoint]}-{rate}qps{limit}-{result.model.split('/')[-1]}-{stamp}.json"
