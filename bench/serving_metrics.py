"""What requests to a server add up to: vLLM's metrics under vLLM's names, and nybble's own beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .client import Record


class Section(NamedTuple):
    """A latency: its short name and its title in the report."""

    short: str
    title: str


# vLLM's definitions: TTFT ends with the first event that has choices, even without text.
VLLM_SECTIONS = {
    "ttft": Section("TTFT", "Time to First Token"),
    "tpot": Section("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": Section("ITL", "Inter-token Latency"),
    "e2el": Section("E2EL", "End-to-end Latency"),
}
# nybble's: until the first event with text, and between tokens however many an event brings.
OWN_SECTIONS = {
    "ttft_first_token": Section("TTFT (text)", "Time to First Event with Text"),
    "itl_token": Section("token ITL", "Inter-token Latency, per Token"),
}
SECTIONS = {**VLLM_SECTIONS, **OWN_SECTIONS}
DETAILED = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
)


def ttft(record: Record) -> float:
    return record.arrivals[0].time - record.sent


def e2el(record: Record) -> float:
    return record.last - record.sent


def tpot(record: Record) -> float | None:
    """Seconds per token after the first; None for a single token."""
    assert record.output_tokens is not None
    return (e2el(record) - ttft(record)) / (record.output_tokens - 1) if record.output_tokens > 1 else None


def itls(record: Record) -> list[float]:
    times = [arrival.time for arrival in record.arrivals]
    return [after - before for before, after in pairwise(times)]


def token_itls(record: Record) -> list[float]:
    """The gap before each event, shared by the tokens it brings; [] when the server does not count them."""
    shared: list[float] = []
    for before, after in pairwise(record.arrivals):
        if before.tokens is None or after.tokens is None:
            return []
        if (count := after.tokens - before.tokens) > 0:
            shared += [(after.time - before.time) / count] * count
    return shared


def latencies(records: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds by section, of successful requests."""
    first_texts = (next((a.time - r.sent for a in r.arrivals if a.text), None) for r in records)
    return {
        "ttft": [ttft(r) for r in records],
        "tpot": [value for r in records if (value := tpot(r)) is not None],
        "itl": [gap for r in records for gap in itls(r)],
        "e2el": [e2el(r) for r in records],
        "ttft_first_token": [value for value in first_texts if value is not None],
        "itl_token": [gap for r in records for gap in token_itls(r)],
    }


def good_requests(records: Sequence[Record], limits: dict[str, float]) -> int:
    """Requests within every limit (ttft, tpot, e2el; ms); TPOT of a single token is 0."""
    measured = {"ttft": ttft, "tpot": lambda r: tpot(r) or 0.0, "e2el": e2el}
    return sum(all(1e3 * measured[name](r) <= limit for name, limit in limits.items()) for r in records)


def peaks(records: Sequence[Record]) -> tuple[float, int]:
    """(most events in one second of the run, most requests in flight at once), as vLLM counts them."""
    if not records:
        return 0.0, 0
    start = min(r.sent for r in records)
    seconds = np.array([int(a.time - start) for r in records for a in r.arrivals])
    moves = sorted([(r.sent, 1) for r in records] + [(r.last, -1) for r in records])
    return float(np.bincount(seconds).max()), int(np.cumsum([move for _, move in moves]).max())


def summarize(
    records: Sequence[Record],
    duration: float,
    *,
    goodput: dict[str, float],
    sections: Sequence[str],
    percentiles: Sequence[float],
) -> dict[str, Any]:
    """vLLM's result keys, with those of `sections`; a latency that no request has is left out."""
    good = [r for r in records if not r.error]
    total_in, total_out = sum(r.prompt_tokens for r in good), sum(r.output_tokens or 0 for r in good)
    peak_tokens, peak_requests = peaks(good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "total_cached_tokens": sum(r.cached_tokens for r in good),
        "request_throughput": len(good) / duration,
        "request_goodput": good_requests(good, goodput) / duration if goodput else None,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "input_lens": [r.prompt_tokens for r in records],
        "output_lens": [0 if r.error else r.output_tokens for r in records],
        "ttfts": [0.0 if r.error else ttft(r) for r in records],
        "itls": [[] if r.error else itls(r) for r in records],
        "latencies": [0.0 if r.error else e2el(r) for r in records],
        "start_times": [r.sent for r in records],
        "queue_times": [r.sent - r.planned if r.sent else 0.0 for r in records],
        "generated_texts": ["".join(a.text for a in r.arrivals) for r in records],
        "errors": [r.error for r in records],
    }
    for name, values in latencies(good).items():
        if values and name in sections:
            found |= {
                f"mean_{name}_ms": 1e3 * float(np.mean(values)),
                f"median_{name}_ms": 1e3 * float(np.median(values)),
                f"std_{name}_ms": 1e3 * float(np.std(values)),
            }
            found |= {f"p{p:g}_{name}_ms": 1e3 * float(np.percentile(values, p)) for p in percentiles}
    return found


def report(
    found: dict[str, Any], *, request_rate: float, max_concurrency: int | None, percentiles: Sequence[float]
) -> list[str]:
    """The lines of vLLM's report, and nybble's own sections after its."""
    head: list[tuple[str, Any]] = [
        ("Successful requests:", found["completed"]),
        ("Failed requests:", found["failed"]),
    ]
    if max_concurrency is not None:
        head.append(("Maximum request concurrency:", max_concurrency))
    if not math.isinf(request_rate):
        head.append(("Request rate configured (RPS):", request_rate))
    head += [
        ("Benchmark duration (s):", found["duration"]),
        ("Total input tokens:", found["total_input_tokens"]),
        ("Total generated tokens:", found["total_output_tokens"]),
        ("Request throughput (req/s):", found["request_throughput"]),
    ]
    if found["request_goodput"] is not None:
        head.append(("Request goodput (req/s):", found["request_goodput"]))
    head += [
        ("Output token throughput (tok/s):", found["output_throughput"]),
        ("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", float(found["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", found["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^50}", *(_line(name, value) for name, value in head)]
    for name, section in SECTIONS.items():
        if f"mean_{name}_ms" in found:
            lines.append(f"{section.title:-^50}")
            for key, title in (
                ("mean", "Mean"),
                ("median", "Median"),
                *((f"p{p:g}", f"P{p:g}") for p in percentiles),
            ):
                lines.append(_line(f"{title} {section.short} (ms):", found[f"{key}_{name}_ms"]))
    lines.append(f"{'What may have helped or hurt':-^50}")
    lines.append(_line("Input tokens from the prefix cache:", found["total_cached_tokens"]))
    lines.append(_line("Client CPU, of one core (%):", found["client_cpu_percent"]))
    lines.append(_line("P99 Client Queue Time (ms):", found["p99_client_queue_time_ms"]))
    return [*lines, "=" * 50]


def _line(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
