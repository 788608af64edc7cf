"""`nybble bench throughput`: many random requests given to the engine at once."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..engine.args import setting
from .command import make_parser, publish, read_settings, start_engine, track
from .results import Metric, make_result
from .workload import generate_exactly, make_rng, random_lengths, random_prompts

if TYPE_CHECKING:
    from ..engine.llm import LLM


@dataclass(frozen=True, kw_only=True)
class ThroughputArgs:
    """The same lengths in every iteration, with new token ids; --seed of the engine also draws these."""

    num_prompts: int = setting(1000, "requests", group="benchmark", low=1)
    input_len: int = setting(1024, "prompt tokens of a request", group="benchmark", low=1)
    output_len: int = setting(128, "output tokens of a request", group="benchmark", low=1)
    random_range_ratio: float = setting(
        0.0, "lengths are uniform within this share of the two above", group="benchmark", low=0, high=1
    )
    num_iters_warmup: int = setting(1, "iterations that are not counted", group="benchmark", low=0)
    num_iters: int = setting(3, "iterations that are", group="benchmark", low=1)
    disable_detokenize: bool = setting(False, "leave out turning tokens into text", group="benchmark")


def main(argv: list[str]) -> int:
    parser = make_parser("throughput", ThroughputArgs, "Give the engine many random requests at once.", engine=True)
    parsed = parser.parse(argv)
    args = read_settings(ThroughputArgs, parsed)
    llm = start_engine(parsed)
    try:
        metrics = measure(llm, args)
        config = llm.llm_engine.config
        result = make_result(
            "throughput",
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


def measure(llm: LLM, args: ThroughputArgs) -> dict[str, Metric]:
    """Requests, tokens and output tokens per second of wall time, the tail included."""
    model = llm.llm_engine.config.model
    rng = make_rng(model.seed)
    input_lens = random_lengths(rng, args.num_prompts, args.input_len, args.random_range_ratio)
    output_lens = random_lengths(rng, args.num_prompts, args.output_len, args.random_range_ratio)
    seconds: list[float] = []
    for i in track(range(-args.num_iters_warmup, args.num_iters), "throughput"):
        prompts = random_prompts(rng, input_lens, model.vocab_size)
        start = time.perf_counter()
        generate_exactly(llm, prompts, output_lens, detokenize=not args.disable_detokenize)
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    counts = {
        "requests": (args.num_prompts, "req/s"),
        "prompt_tokens": (sum(input_lens), "tok/s"),
        "output_tokens": (sum(output_lens), "tok/s"),
        "total_tokens": (sum(input_lens) + sum(output_lens), "tok/s"),
    }
    return {
        f"{name}_per_s": Metric.of([count / s for s in seconds], unit, better="higher")
        for name, (count, unit) in counts.items()
    }
