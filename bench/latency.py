"""`nybble bench latency`: wall time of one batch from first prompt token to last output token."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..engine.args import setting
from ..plugins.errors import UsageError
from .command import make_parser, publish, read_settings, start_engine, track
from .results import Metric, make_result
from .workload import generate_exactly, make_rng, random_prompts

if TYPE_CHECKING:
    from ..engine.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, kw_only=True)
class LatencyArgs:
    """One batch, timed again and again; --seed of the engine also draws the prompts."""

    input_len: int = setting(32, "prompt tokens of each request", group="benchmark", low=1)
    output_len: int = setting(128, "output tokens of each request", group="benchmark", low=1)
    batch_size: int = setting(8, "requests in the batch", group="benchmark", low=1)
    num_iters_warmup: int = setting(10, "iterations that are not counted", group="benchmark", low=0)
    num_iters: int = setting(30, "iterations that are", group="benchmark", low=1)
    baseline_output_len: int = setting(
        0,
        "also time this many output tokens, and report the difference per token as a decode step (0: do not)",
        group="benchmark",
        low=0,
    )
    disable_detokenize: bool = setting(False, "leave out turning tokens into text", group="benchmark")


def main(argv: list[str]) -> int:
    parser = make_parser(
        "latency",
        LatencyArgs,
        "Time one batch of random prompts, every request to its full length.",
        engine=True,
    )
    parsed = parser.parse(argv)
    args = read_settings(LatencyArgs, parsed)
    if args.baseline_output_len >= args.output_len:
        raise UsageError(
            "--baseline-output-len must be less than --output-len",
            found=f"{args.baseline_output_len} and {args.output_len}",
        )
    llm = start_engine(parsed)
    try:
        metrics = measure(llm, args)
        config = llm.llm_engine.config
        result = make_result(
            "latency",
            argv,
            model=config.model.served_model_name,
            toy_model=config.model.is_demo,
            device=config.device.device,
            workload=asdict(args),
            metrics=metrics,
        )
    finally:
        llm.shutdown()
    publish(result, parsed.output_json)
    return 0


def measure(llm: LLM, args: LatencyArgs) -> dict[str, Metric]:
    """`batch_latency`, and `decode_step` when there is a baseline."""
    model = llm.llm_engine.config.model
    rng = make_rng(model.seed)

    def seconds(output_len: int) -> float:
        prompts = random_prompts(rng, [args.input_len] * args.batch_size, model.vocab_size)
        start = time.perf_counter()
        generate_exactly(llm, prompts, [output_len] * args.batch_size, detokenize=not args.disable_detokenize)
        return time.perf_counter() - start

    whole: list[float] = []
    steps: list[float] = []
    for i in track(range(-args.num_iters_warmup, args.num_iters), "latency"):
        taken = seconds(args.output_len)
        base = seconds(args.baseline_output_len) if args.baseline_output_len else 0.0
        if i >= 0:
            whole.append(taken)
            steps.append((taken - base) / (args.output_len - args.baseline_output_len))
    metrics = {"batch_latency": Metric.of(whole, "s", better="lower", percentiles=PERCENTILES)}
    if args.baseline_output_len:
        metrics["decode_step"] = Metric.of([1e3 * s for s in steps], "ms", better="lower", percentiles=PERCENTILES)
    return metrics
