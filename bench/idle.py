"""`nybble bench idle`: how much of decoding the device waits for the host, from a profiler's trace."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..engine.args import EngineArgs, setting
from ..engine.device import cuda_devices
from .command import make_parser, pick, read_settings
from .offline import FAILED, model_args, release, suite_args
from .peers import MODELS, OTHERS
from .results import Metric, make_result, write_json
from .workload import make_rng, random_prompts

if TYPE_CHECKING:
    from ..engine.llm import LLM

# What CUDA's run time calls are named in which the host waits for the device.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize",
         "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize")
# A copy into pageable memory waits inside its own call, which otherwise takes a few microseconds.
COPY_CALL, LONG_COPY = "cudaMemcpyAsync", 20.0
COPIES = ("Memcpy", "Memset")
COLUMNS = f"{'model':<18} {'requests':>8} {'step ms':>8} {'idle':>7} {'busy ms':>8} {'kernels':>8} {'copies':>7} " \
          f"{'host ms':>8} {'plan ms':>8}"


@dataclass(frozen=True, kw_only=True)
class IdleArgs:
    """Decoding of the suite's models, all requests at once."""

    models: str = setting("all", f"of {', '.join([*MODELS, *OTHERS])}, separated by commas", group="benchmark")
    num_seqs: str = setting("1,32,256", "running requests, separated by commas", group="benchmark")
    prompt_len: int = setting(128, "prompt tokens of each", group="benchmark", low=1)
    num_steps: int = setting(50, "steps that are traced, and as many that are timed without a trace",
                             group="benchmark", low=1)
    num_steps_warmup: int = setting(10, "decode steps before them", group="benchmark", low=0)


class Span(NamedTuple):
    """Something between two times, in microseconds; `device` is whether the device did it."""

    name: str
    start: float
    end: float
    device: bool


class Trace(NamedTuple):
    """What a trace says of some steps, per step but for `idle`. Times in milliseconds; None without a device.

    Attributes:
        idle: share of the time from the first kernel's start to the last one's end in which the device did nothing.
        busy: time in which it did something.
        waiting: in which the host waited for it.
    """

    idle: float | None
    busy: float | None
    kernels: float
    copies: float
    waiting: float


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def read_trace(spans: Sequence[Span], steps: int) -> Trace:
    """Sum up the events of `steps` steps."""
    device = [span for span in spans if span.device]
    copies = [span for span in device if span.name.startswith(COPIES)]
    waiting = union((s.start, s.end) for s in spans if not s.device and _waits(s)) / 1e3 / steps
    if not device:
        return Trace(None, None, 0.0, 0.0, waiting)
    busy = union((span.start, span.end) for span in device)
    whole = max(span.end for span in device) - min(span.start for span in device)
    return Trace(1 - busy / whole if whole else 0.0, busy / 1e3 / steps, (len(device) - len(copies)) / steps,
                 len(copies) / steps, waiting)


def _waits(span: Span) -> bool:
    return span.name in WAITS or (span.name == COPY_CALL and span.end - span.start > LONG_COPY)


def main(argv: list[str]) -> int:
    parser = make_parser("idle", IdleArgs, "Decode under torch.profiler: share of the time between the first and "
                         "the last kernel in which none runs, kernels and copies a step, host time a step without its "
                         "waiting.",
                         engine=True)
    parsed = parser.parse(argv)
    args = read_settings(IdleArgs, parsed)
    models = pick(args.models, {**MODELS, **OTHERS}, "model", every=MODELS)
    given = suite_args(parsed)
    metrics: dict[str, Metric] = {}
    graphs: dict[str, Any] = {}
    failures: list[str] = []

    def keep() -> None:
        result = make_result("idle", argv, model=",".join(models), toy_model=any(m.toy for m in models.values()),
                             device=given.device if given.device != "auto" else "cuda" if cuda_devices()[0] else "cpu",
                             workload=asdict(args), metrics=metrics)
        if parsed.output_json:
            write_json(Path(parsed.output_json), result, {"graphs": graphs, "failures": failures})

    print(COLUMNS, flush=True)
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        for name, model in models.items():
            try:
                for found in run_model(name, model_args(given, name, model, Path(folder)), args, graphs):
                    metrics |= found
                    keep()
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(f"{name:<18} failed: {failures[-1]}", flush=True)
            release("cuda" if cuda_devices()[0] else "cpu")
    keep()
    return FAILED if failures else 0


def run_model(name: str, engine: EngineArgs, args: IdleArgs, graphs: dict[str, Any]) -> Iterator[dict[str, Metric]]:
    """One engine at every number of requests; what it says of its CUDA graphs goes to `graphs`."""
    from ..engine.llm import LLM

    llm = LLM.from_engine_args(engine)
    try:
        if report := capture_report(llm):
            graphs[name] = report
            print(f"{name:<18} graphs: {report}", flush=True)
            yield {f"{name}/{key}": value for key, value in graph_metrics(report).items()}
        for count in map(int, args.num_seqs.split(",")):
            yield {f"{name}/{count}/{key}": value for key, value in measure(llm, name, count, args).items()}
    finally:
        llm.shutdown()


def capture_report(llm: LLM) -> Any:
    """What the engine says of its captured graphs (seconds, bytes), of plain values; None where it captures none."""
    found: Any = llm.llm_engine.client
    for name in ("core", "executor", "worker", "runner", "capture_report"):
        found = getattr(found, name, None)
    found = found() if callable(found) else found
    if hasattr(found, "_asdict"):
        return found._asdict()
    if found is None or isinstance(found, str | int | float | Mapping):
        return found
    return msgspec.to_builtins(found, enc_hook=str)


def graph_metrics(report: Any) -> dict[str, Metric]:
    """The numbers of such a report: seconds, bytes."""
    entries = report.items() if isinstance(report, Mapping) else ()
    return {f"graphs/{key}": Metric.of([float(value)], key, better="lower") for key, value in entries
            if isinstance(value, int | float)}


def measure(llm: LLM, name: str, count: int, args: IdleArgs) -> dict[str, Metric]:
    """Decode `count` requests: some steps timed, then as many traced. Prints a line."""
    from ..engine.request import SamplingParams

    engine, config = llm.llm_engine, llm.llm_engine.config
    steps = args.num_steps
    # none may end; a loop that runs ahead, and prompts that come in several steps, take some more
    wanted = 2 * (steps + args.num_steps_warmup) + 2 + -(-count * args.prompt_len // 1024)
    params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True, detokenize=False)
    prompts = random_prompts(make_rng(0), [args.prompt_len] * count, config.model.vocab_size)
    ids = [f"idle-{i}" for i in range(count)]
    for request_id, prompt in zip(ids, prompts):
        engine.add_request(request_id, prompt, params)
    try:
        waiting = set(ids)
        while waiting:
            waiting -= {output.request_id for output in engine.step()}
        for _ in range(args.num_steps_warmup):
            engine.step()
        seconds, planning = list[float](), list[float]()
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
            planning.append(engine.stats.schedule_seconds)
        traced, host = trace_steps(llm, steps, args.num_steps_warmup)
    finally:
        engine.abort_request(ids)
    host = max(0.0, host - traced.waiting)
    step, plan = (Metric.of([1e3 * s for s in values], "ms", better="lower") for values in (seconds, planning))
    idle = "-" if traced.idle is None else f"{traced.idle:.1%}"
    busy = "-" if traced.busy is None else f"{traced.busy:.3f}"
    print(f"{name:<18} {count:>8} {step.median:>8.3f} {idle:>7} {busy:>8} {traced.kernels:>8.1f} {traced.copies:>7.1f} "
          f"{host:>8.3f} {plan.median:>8.3f}", flush=True)
    found: dict[str, tuple[float | None, str]] = {
        "idle": (traced.idle, "of time"), "busy": (traced.busy, "ms"), "kernels": (traced.kernels, "per step"),
        "copies": (traced.copies, "per step"), "host": (host, "ms")}
    return {"step": step, "plan": plan} | {
        key: Metric.of([value], unit, better="lower") for key, (value, unit) in found.items() if value is not None}


def trace_steps(llm: LLM, steps: int, warm_up: int) -> tuple[Trace, float]:
    """Trace decode steps: (what the trace says, milliseconds a step under it)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities):  # the first trace of a process sets the profiler up
        for _ in range(warm_up):
            llm.llm_engine.step()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            llm.llm_engine.step()
        taken = 1e3 * (time.perf_counter() - start) / steps
        if cuda:
            torch.cuda.synchronize()
    return read_trace(spans_of(profiler), steps), taken


def spans_of(profiler: Any) -> list[Span]:
    """The events of a finished profiler."""
    return [Span(event.name, event.time_range.start, event.time_range.end, event.device_type.name == "CUDA")
            for event in profiler.events()]
