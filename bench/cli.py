"""`nybble bench COMMAND`: find the benchmark and run it. Imports almost nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from ..plugins.errors import UsageError, did_you_mean


class Benchmark(NamedTuple):
    """A benchmark: a line of help and the module beside this one that has `main(argv)`."""

    help: str
    module: str


BENCHMARKS = {
    "latency": Benchmark("wall time of one batch", "latency"),
    "throughput": Benchmark("tokens per second of many requests at once", "throughput"),
    "offline": Benchmark("fixed workloads on real shapes, beside their floors and another engine", "offline"),
    "serve": Benchmark("a running server under load: TTFT, TPOT, ITL, throughput", "serve"),
    "transformers": Benchmark("the same requests through transformers' generate and nybble", "transformers_peer"),
    "kernels": Benchmark("linear kernels against their floors", "kernels"),
    "methods": Benchmark("one model in every quantization format", "methods"),
    "moe": Benchmark("fused experts of real models against their floors and torch's grouped products", "moe"),
    "step": Benchmark("host time of scheduling and input preparation", "step"),
    "idle": Benchmark("share of a decode step in which the device waits, kernels and host time", "idle"),
    "load": Benchmark("weights from disk to a device, beside a plain read of the same files", "loading"),
    "startup": Benchmark("process start to ready", "startup"),
    "compare": Benchmark("two result files; exit code 1 on a regression", "compare"),
}


def main(argv: list[str]) -> int:
    """Run one benchmark and return its exit code. Raises UsageError for an unknown one."""
    if not argv or argv[0].split("=")[0] in ("-h", "--help"):
        print("usage: nybble bench COMMAND [flags]\n\ncommands (nybble bench COMMAND --help says more):")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:<14}{benchmark.help}")
        return 0
    name = argv[0]
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name!r}", known=BENCHMARKS, fix=did_you_mean(name, BENCHMARKS))
    run: Callable[[list[str]], int] = import_module(f".{BENCHMARKS[name].module}", __package__).main
    return run(argv[1:])
