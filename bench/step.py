"""`nybble bench step`: host time of a decode step around the model: scheduling, inputs, bookkeeping.

The real scheduler and GPUModelRunner run with a model and a sampler that cost nothing and read the clock.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..engine.args import setting
from ..engine.attention.base import StepShape
from ..engine.attention.torch_paged import TorchPagedBackend
from ..engine.config import CacheConfig, SchedulerConfig
from ..engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec
from ..engine.request import EngineCoreRequest, SamplingParams
from ..engine.sample import Sampler, SamplingState
from ..engine.sample.metadata import SamplingMetadata
from ..engine.sample.sampler import SamplerOutput
from ..engine.sched.scheduler import Scheduler
from ..engine.worker.gpu_model_runner import GPUModelRunner
from ..models import Attention, AttentionRun, Batch, CausalLM
from .command import make_parser, publish, read_settings
from .results import Metric, make_result

BLOCK_SIZE = 16
VOCAB_SIZE = 64
PERCENTILES = (90, 99)
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepArgs:
    """Requests that all decode, one token a step each."""

    num_seqs: int = setting(256, "running requests", group="benchmark", low=1)
    prompt_len: int = setting(128, "prompt tokens of each", group="benchmark", low=1)
    num_steps: int = setting(300, "steps that are counted", group="benchmark", low=1)
    num_steps_warmup: int = setting(20, "steps that are not", group="benchmark", low=1)
    temperature: float = setting(1.0, "0 is greedy; else every request draws", group="benchmark", low=0)


@dataclass
class Marks:
    """When each stage of the step in progress ended, in seconds."""

    prepared: float = 0.0
    attention: float = 0.0
    logits: float = 0.0
    metadata: float = 0.0
    sampled: float = 0.0


class FreeModel(CausalLM):
    """Hidden states and logits made beforehand."""

    def __init__(self, marks: Marks, max_tokens: int) -> None:
        super().__init__()
        self.marks = marks
        self.hidden, self.logits = torch.zeros(max_tokens, 1), torch.zeros(max_tokens, VOCAB_SIZE)

    def forward(self, batch: Batch) -> Tensor:
        return self.hidden[: len(batch.ids)]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self.logits[: len(hidden)]
        self.marks.logits = time.perf_counter()
        return logits


class FreeSampler(Sampler):
    """Token 1 for every row."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def forward(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        self.marks.metadata = time.perf_counter()
        rows = len(logits)
        out = SamplerOutput(
            token_ids=torch.ones(rows, dtype=torch.int64),
            invalid=torch.zeros(rows, dtype=torch.bool),
            logprobs=None,
            errors={},
        )
        self.marks.sampled = time.perf_counter()
        return out


class ClockedBackend(TorchPagedBackend):
    """The real backend; only its preparation runs, between two readings."""

    marks: Marks

    def prepare(self, step: StepShape) -> AttentionRun:
        self.marks.prepared = time.perf_counter()
        run = super().prepare(step)
        self.marks.attention = time.perf_counter()
        return run


def main(argv: list[str]) -> int:
    parser = make_parser(
        "step",
        StepArgs,
        "Host time of a decode step, the model's own left out. "
        "`step` is scheduling and input preparation; `all` adds bookkeeping.",
    )
    parsed = parser.parse(argv)
    args = read_settings(StepArgs, parsed)
    torch.set_num_threads(1)
    result = make_result(
        "step",
        argv,
        model="no model",
        toy_model=False,
        device="cpu",
        workload=asdict(args),
        metrics=measure(args),
    )
    publish(result, parsed.output_json)
    return 0


def measure(args: StepArgs) -> dict[str, Metric]:
    """Milliseconds of each part of a step, by part."""
    scheduler, runner, marks = build(args)
    for i in range(args.num_seqs):
        scheduler.add_request(
            EngineCoreRequest(
                request_id=f"request-{i}",
                prompt_token_ids=[(7 * i + j) % VOCAB_SIZE for j in range(args.prompt_len)],
                params=SamplingParams(temperature=args.temperature, max_tokens=_max_tokens(args)),
                seed=i,
                max_tokens=_max_tokens(args),
            )
        )
    samples: dict[str, list[float]] = {}
    for i in range(-1 - args.num_steps_warmup, args.num_steps):  # the first admits and prefills
        parts = one_step(scheduler, runner, marks)
        if i >= 0:
            for name, seconds in parts.items():
                samples.setdefault(name, []).append(1e3 * seconds)
    assert len(scheduler.running) == args.num_seqs, "every request decodes to the end"
    return {name: Metric.of(values, "ms", better="lower", percentiles=PERCENTILES) for name, values in samples.items()}


def one_step(scheduler: Scheduler, runner: GPUModelRunner, marks: Marks) -> dict[str, float]:
    """Run one step; seconds of each part. What the free model and sampler take is in none of them."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    planned = time.perf_counter()
    result = runner.execute_model(plan)
    executed = time.perf_counter()
    scheduler.update(plan, result)
    updated = time.perf_counter()
    parts = {
        "schedule": planned - start,
        "prepare": marks.prepared - planned,
        "sampling_metadata": marks.metadata - marks.logits,
        "attention_prepare": marks.attention - marks.prepared,
        "record": executed - marks.sampled,
        "update": updated - executed,
    }
    inputs = ("schedule", "prepare", "sampling_metadata", "attention_prepare")
    return {"step": sum(parts[name] for name in inputs), "all": sum(parts.values()), **parts}


def build(args: StepArgs) -> tuple[Scheduler, GPUModelRunner, Marks]:
    """A scheduler and a runner with room for every request in one step and to the end."""
    marks, max_len = Marks(), args.prompt_len + _max_tokens(args)
    max_tokens = args.num_seqs * args.prompt_len
    layer = Attention(0, num_heads=1, num_kv_heads=1, head_dim=1)
    spec = KVCacheSpec(shape=(2, 1, 1), dtype_bytes=4)
    layout = KVCacheLayout(
        num_blocks=1 + args.num_seqs * -(-max_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        groups=[KVCacheGroup(layers=[0], spec=spec)],
    )
    scheduler = Scheduler(
        scheduler=SchedulerConfig(max_num_seqs=args.num_seqs, max_num_batched_tokens=max_tokens),
        cache=CacheConfig(block_size=BLOCK_SIZE),
        max_model_len=max_len,
        layout=layout,
    )
    backend = ClockedBackend([layer], layout, dtype=torch.float32, device=CPU)
    backend.marks = marks
    runner = GPUModelRunner(
        FreeModel(marks, max_tokens),
        backend,
        SamplingState(max_rows=args.num_seqs, vocab_size=VOCAB_SIZE, device=CPU),
        max_num_seqs=args.num_seqs,
        max_len=max_len,
        max_tokens=max_tokens,
        block_size=BLOCK_SIZE,
        device=CPU,
    )
    runner.sampler = FreeSampler(marks)
    return scheduler, runner, marks


def _max_tokens(args: StepArgs) -> int:
    return args.num_steps_warmup + args.num_steps + 2
