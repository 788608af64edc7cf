"""`nybble bench offline --suite peers`: fixed workloads on real shapes, beside their floors and another engine."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.args import EngineArgs, setting, setting_fields
from ..engine.cli.parser import engine_args
from ..plugins.errors import UsageError
from .command import make_parser, pick, read_settings
from .floors import Floors, measure_floors
from .peers import MODELS, OTHERS, PEER, STARTS, Cell, PeerModel, Workload, floor_of, sizes, write_model
from .results import Metric, Result, make_result, write_json
from .startup import ready_seconds
from .workload import generate_exactly, make_rng, random_prompts

if TYPE_CHECKING:
    from ..engine.llm import LLM

START = "start"
READY = "import json, sys, nybble; nybble.LLM(**json.loads(sys.argv[1])); print('ready', flush=True)"
MAX_MODEL_LEN = 4096
# What the suite sets where no flag does.
SUITE: dict[str, Any] = {
    "load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 256, "enable_prefix_caching": False,
    "use_tqdm_on_load": False,
}
HIT_STEPS = 4
FAILED = 1
COLUMNS = f"{'model':<18} {'workload':<11} {'unit':<6} {'floor':>8} {'nybble':>8} {PEER:>12} {'goal':>8} {'/floor':>7}"


@dataclass(frozen=True, kw_only=True)
class OfflineArgs:
    """Which models and workloads; engine flags go to every engine that is started."""

    suite: str = setting("peers", "the workloads", group="benchmark", choices=("peers",))
    models: str = setting("all", f"of {', '.join([*MODELS, *OTHERS])}, separated by commas", group="benchmark")
    workloads: str = setting("all", "of bs1, bs32, prefill, mixed, start, separated by commas", group="benchmark")
    repeat: int = setting(2, "times each workload is timed, after one warm-up; the best is shown", group="benchmark",
                          low=1)
    hits: bool = setting(True, "count the experts that decoding hits, in an engine of its own that is not timed",
                         group="benchmark")
    timeout: float = setting(300.0, "seconds until a start has failed", group="benchmark", above=0)


@dataclass(kw_only=True)
class Report:
    """What has been measured so far: told on stdout, and written whole after every cell."""

    argv: list[str]
    args: OfflineArgs
    models: Mapping[str, PeerModel]
    device: str
    floors: Floors
    output_json: str | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, model: str, workload: str, values: Sequence[float], unit: str, *, floor: float | None = None) -> None:
        higher = unit == "tok/s"
        metric = Metric.of(values, unit, better="higher" if higher else "lower")
        self.metrics[f"{model}/{workload}"] = metric
        cell = self.models[model].cells.get(workload, Cell(peer=None, goal=None))
        best = metric.max if higher else metric.min
        over = None if floor is None else floor / best if higher else best / floor
        numbers = (f"{_short(v):>{w}}" for v, w in ((floor, 8), (best, 8), (cell.peer, 12), (cell.goal, 8), (over, 7)))
        self._tell(f"{model:<18} {workload:<11} {unit:<6} {' '.join(numbers)}")

    def fail(self, model: str, what: str, error: Exception) -> None:
        """Note what could not be measured; the rest is measured all the same."""
        self.failures.append(f"{model}/{what}: {type(error).__name__}: {error}")
        self._tell(f"{model:<18} {what:<11} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _tell(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)
        if self.output_json and self.metrics:
            extra = {"failures": self.failures, "floors": asdict(self.floors)}
            write_json(Path(self.output_json), self.result(), extra)

    def result(self) -> Result:
        return make_result("offline", self.argv, model=",".join(self.models), toy_model=any(
            model.toy for model in self.models.values()), device=self.device, workload=asdict(self.args),
            metrics=self.metrics)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def main(argv: list[str]) -> int:
    parser = make_parser("offline", OfflineArgs, "Decode, prefill and start models of real shapes with made-up "
                         "weights. A cell is told as soon as it is measured; the table comes again at the end.",
                         engine=True)
    parsed = parser.parse(argv)
    args = read_settings(OfflineArgs, parsed)
    models = pick(args.models, {**MODELS, **OTHERS}, "model", every=MODELS)
    workloads = pick(args.workloads, dict.fromkeys(("bs1", "bs32", "prefill", "mixed", START)), "workload")
    given = suite_args(parsed)
    import torch

    from ..engine.device import cuda_devices

    device = "cuda" if given.device != "cpu" and cuda_devices()[0] else "cpu"
    floors = measure_floors(torch.device(device))
    release(device)
    report = Report(argv=argv, args=args, models=models, device=device, floors=floors, output_json=parsed.output_json)
    print(f"floors: {floors.bandwidth / 1e9:.0f} GB/s, "
          + ", ".join(f"{kind} {rate / 1e12:.1f} T/s" for kind, rate in floors.operations.items()))
    print(COLUMNS, flush=True)
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        engines = {name: model_args(given, name, model, Path(folder)) for name, model in models.items()}
        run_models(engines, workloads, report)
    print("", COLUMNS, *report.lines, sep="\n")
    return FAILED if report.failures else 0


def suite_args(parsed: Namespace) -> EngineArgs:
    """The engine's settings: the user's, and the suite's where there are none. Raises UsageError for a model."""
    args, origins = engine_args(parsed)
    given = {name for name, origin in origins.items() if origin != "default"}
    if "model" in given:
        raise UsageError("the suite has models of its own", found=args.model, fix="--models NAME,NAME")
    return replace(args, **{name: value for name, value in SUITE.items() if name not in given})


def model_args(given: EngineArgs, name: str, model: PeerModel, folder: Path) -> EngineArgs:
    """The settings for one model of the suite, whose config is written below `folder`."""
    length = given.max_model_len or min(MAX_MODEL_LEN, model.config["max_position_embeddings"])
    return replace(given, model=str(write_model(folder / name, model.config)), max_model_len=length)


def run_models(engines: Mapping[str, EngineArgs], workloads: Mapping[str, None], report: Report) -> None:
    """Model after model what is timed in this process; then the experts hit; then starts, which cost the most."""
    timed = [name for name in workloads if name != START]
    passes: list[tuple[str, Callable[[str, EngineArgs], None]]] = []
    if timed:
        passes.append(("engine", lambda name, engine: run_model(name, engine, timed, report)))
    if timed and report.args.hits:
        passes.append(("hits", lambda name, engine: run_hits(name, engine, timed, report)))
    if START in workloads:
        passes.append((START, lambda name, engine: run_starts(name, engine, report)))
    for what, measure in passes:
        for name, engine in engines.items():
            try:
                measure(name, engine)
            except Exception as error:
                report.fail(name, what, error)
            release(report.device)


def run_model(name: str, engine: EngineArgs, workloads: Sequence[str], report: Report) -> None:
    """One engine, workload after workload."""
    from ..engine.llm import LLM

    start = time.perf_counter()
    llm = LLM.from_engine_args(engine)
    print(f"{name}: an engine in this process after {time.perf_counter() - start:.1f} s", flush=True)
    model = report.models[name]
    try:
        for workload in workloads:
            shape = model.workloads[workload]
            try:
                values = time_workload(llm, shape, report.args.repeat)
            except Exception as error:
                report.fail(name, workload, error)
            else:
                report.add(name, workload, values, shape.unit, floor=floor_of(model.config, shape, report.floors))
    finally:
        llm.shutdown()


def release(device: str) -> None:
    """Give back what an engine of this process held on the device."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def time_workload(llm: LLM, workload: Workload, repeat: int) -> list[float]:
    """Milliseconds per step, or tokens per second, `repeat` times after a warm-up of the same shape."""
    config = llm.llm_engine.config.model
    rng = make_rng(config.seed)

    def seconds(new: int) -> float:
        prompts = random_prompts(rng, [workload.prompt] * workload.count, config.vocab_size)
        start = time.perf_counter()
        generate_exactly(llm, prompts, [new] * workload.count, detokenize=False)
        return time.perf_counter() - start

    seconds(workload.new)
    if workload.base is None:
        return [workload.counted / seconds(workload.new) for _ in range(repeat)]
    seconds(workload.base)
    whole = [seconds(workload.new) for _ in range(repeat)]
    base = min(seconds(workload.base) for _ in range(repeat))
    return [1e3 * (taken - base) / (workload.new - workload.base) for taken in whole]


def run_hits(name: str, engine: EngineArgs, workloads: Sequence[str], report: Report) -> None:
    """Distinct experts of a layer that a decode step uses, and the floor that follows from them."""
    model = report.models[name]
    steps = {workload: shape for workload, shape in model.workloads.items()
             if workload in workloads and shape.base is not None}
    if not (steps and sizes(model.config).experts):
        return
    from ..engine.llm import LLM

    llm = LLM.from_engine_args(replace(engine, expert_stats=True))
    try:
        for workload, shape in steps.items():
            hits = experts_hit(llm, shape)
            floor = floor_of(model.config, shape, report.floors, hit=sum(hits) / len(hits))
            report.add(name, f"{workload}/hit", hits, "experts")
            print(f"{'':<18} with those experts the floor is {_short(floor)} ms", flush=True)
    finally:
        llm.shutdown()


def experts_hit(llm: LLM, workload: Workload) -> list[float]:
    """The mean over layers of distinct experts, in each of some decode steps of `workload.count` requests."""
    from ..engine.request import SamplingParams

    engine, vocab = llm.llm_engine, llm.llm_engine.config.model.vocab_size
    prompts = random_prompts(make_rng(0), [workload.prompt] * workload.count, vocab)
    params = SamplingParams(temperature=0.0, max_tokens=workload.new, ignore_eos=True, detokenize=False)
    ids = [f"hit-{i}" for i in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts):
        engine.add_request(request_id, prompt, params)
    waiting, hits = set(ids), list[float]()
    try:
        while waiting:  # until every request decodes
            waiting -= {output.request_id for output in engine.step()}
        for _ in range(HIT_STEPS):
            engine.expert_counts(reset=True)
            engine.step()
            layers = [sum(count > 0 for count in layer.counts) for layer in engine.expert_counts()]
            if sum(layers):  # a loop that runs ahead may have had nothing to compute
                hits.append(sum(layers) / len(layers))
    finally:
        engine.abort_request(ids)
    return hits


def run_starts(name: str, engine: EngineArgs, report: Report) -> None:
    """Seconds from process start to a ready LLM, with empty caches and with those the first start left."""
    defaults = EngineArgs()
    settings = {key: getattr(engine, key) for key in setting_fields() if getattr(engine, key) != getattr(defaults, key)}
    words = ["-c", READY, json.dumps(settings)]
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as cache:
        for heat in STARTS:
            report.add(name, heat, [ready_seconds(words, cache, report.args.timeout)], "s")
