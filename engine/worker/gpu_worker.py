"""One device: load the model, measure what memory is left, hold the runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property

import psutil
import torch

from ...csrc.compile_ahead import compiled_ahead
from ...csrc.select import Choice
from ...models import AttentionLayer
from ...moe import Experts
from ...plugins import env
from ...plugins.errors import OutOfMemoryError, UsageError
from ...plugins.log import get_logger
from ...plugins.manager import PluginHost
from ..attention.base import AttentionBackend, AttentionProblem
from ..attention.select import attention_problems, attention_report, choose_attention_backend
from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..layer_report import AttentionReport
from ..loader import LoadedModel, get_model
from ..plan import KVCacheGroup, KVCacheLayout, KVCacheSpec, NewRequest, Plan, Result
from ..request import SamplingParams
from ..sample import SamplingState
from .decode_graphs import graph_sizes
from .device_memory import CudaMemory, DeviceMemory
from .gpu_model_runner import GPUModelRunner
from .warm_steps import WarmStep, warm_steps

log = get_logger(__name__)

# A dummy request samples once after its prompt and once more after a decode step.
DUMMY_OUTPUTS = 2
WARM_TOKENS = 16


class GPUWorker:
    """A worker process's part: `load_model`, `compile_kernels`, `available_kv_bytes`, `initialize_cache`, `warm_up`,
    `launch`."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        host.check(config.plugins.fingerprint)
        self.config, self.host = config, host
        self.device = torch.device(config.device.device)
        self.dtype = getattr(torch, config.model.dtype)
        self.cache_dtype = torch.float8_e4m3fn if config.cache.kv_cache_dtype == "fp8" else self.dtype
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
        if config.device.cpu_threads:
            torch.set_num_threads(config.device.cpu_threads)
        self.memory: DeviceMemory | None = CudaMemory(self.device) if self.device.type == "cuda" else None
        self.loaded: LoadedModel | None = None
        self.runner: GPUModelRunner | None = None
        self.layout: KVCacheLayout | None = None

    @property
    def _attention_layers(self) -> list[AttentionLayer]:
        assert self.loaded is not None, "load_model comes first"
        return self.loaded.model.attention_layers()

    @property
    def _expert_layers(self) -> list[Experts]:
        assert self.loaded is not None, "load_model comes first"
        return [module for module in self.loaded.model.modules() if isinstance(module, Experts)]

    def load_model(self) -> None:
        start = time.monotonic()
        self.loaded = get_model(self.config, self.host, self.device)
        log.info("loaded %s in %.2f s (%s)", self.config.model.served_model_name, time.monotonic() - start,
                 self.config.model.architecture)

    def compile_kernels(self) -> None:
        """Have what `warm_up` and requests will launch compiled side by side, where kernels are compiled when met.

        No step takes up what another one sampled: nothing may have. What a kernel raises that cannot bear a run on
        zeros, a plugin's perhaps, costs this head start and nothing else; one that breaks the device's context breaks
        the start, and NYBBLE_COMPILE_AHEAD=0 does without this.
        """
        if self.device.type != "cuda" or not env.read_flag("NYBBLE_COMPILE_AHEAD", default=True):
            return
        start = time.monotonic()
        length, count, layout = self._largest_step()
        try:
            self._build_runner(layout)
            assert self.runner is not None and self.loaded is not None
            with compiled_ahead(self.device), self.loaded.model.one_layer_of_a_kind():
                for step in [WarmStep(length, count), *reversed(self._warm_steps(layout))]:
                    self._run_dummy(step.tokens, step.prompts, chunk=step.chunk, decode=False)
                self.runner.rehearse_decoding()
        except Exception as error:
            log.warning("kernels will be compiled one after another, since a run on zeros failed: %s: %s",
                        type(error).__name__, error)
        else:
            log.info("kernels are compiled after %.2f s", time.monotonic() - start)
        self.runner = None

    def kv_cache_groups(self) -> list[KVCacheGroup]:
        """Layers by what they keep per token. One group: the pool's blocks are then interchangeable."""
        specs = {KVCacheSpec(shape=a.kv_shape, dtype_bytes=self.cache_dtype.itemsize) for a in self._attention_layers}
        if len(specs) != 1:
            raise UsageError("every layer must keep the same KV per token in this release",
                             found=sorted(map(str, specs)))
        return [KVCacheGroup(layers=[a.index for a in self._attention_layers], spec=specs.pop())]

    def available_kv_bytes(self) -> int:
        """Bytes the KV cache may take: `gpu_memory_utilization` of the device less what a full step was seen to use.

        On CUDA steps of `max_num_batched_tokens` are run on a cache of its own, with every routing that may be the most
        expensive to a layer of experts, and the peak measured, other processes' memory included; on CPU it is that
        share of the memory now free.
        """
        cache = self.config.cache
        if cache.kv_cache_memory_bytes is not None:
            return cache.kv_cache_memory_bytes
        if self.memory is None:
            return int(psutil.virtual_memory().available * cache.gpu_memory_utilization)
        start = time.monotonic()
        self.memory.begin()
        cache_bytes = self._profile_step()
        activations = self.memory.peak() - cache_bytes
        used, total = self.memory.room()
        graphs = 0
        if self._captures:  # each keeps its logits
            rows = sum(graph_sizes(self.config.scheduler.max_num_seqs))
            graphs = rows * self.config.model.vocab_size * self.dtype.itemsize
        budget = int(total * cache.gpu_memory_utilization) - used - activations - graphs
        log.info("memory: %.2f GiB of %.2f in use, %.2f for a step's activations, %.2f for CUDA graphs, %.2f left for "
                 "the KV cache; measured in %.2f s", used / 2**30, total / 2**30, activations / 2**30, graphs / 2**30,
                 budget / 2**30, time.monotonic() - start)
        if budget <= 0:
            raise OutOfMemoryError(
                "no memory is left for the KV cache",
                found=f"{used / 2**30:.2f} GiB in use + {activations / 2**30:.2f} GiB activations >= "
                      f"{cache.gpu_memory_utilization} x {total / 2**30:.2f} GiB",
                fix="raise --gpu-memory-utilization, lower --max-num-batched-tokens, or take a smaller model",
            )
        return budget

    def _profile_step(self) -> int:
        """Run the largest step on a throw-away cache, once with each extreme routing; the bytes of that cache."""
        length, count, layout = self._largest_step()
        self._build_runner(layout)
        for _ in self._extreme_routings():
            self._run_dummy(length, count)
        self.runner = None
        return layout.num_blocks * sum(group.spec.bytes_per_block(layout.block_size) * len(group.layers)
                                       for group in layout.groups)

    def _largest_step(self) -> tuple[int, int, KVCacheLayout]:
        """Tokens of each of its prompts, how many there are, and a cache that holds them."""
        limits = self.config.scheduler
        length = max(1, min(limits.max_num_batched_tokens, self.config.model.max_model_len - DUMMY_OUTPUTS))
        block_size = self.config.cache.block_size
        count = max(1, min(limits.max_num_batched_tokens // length, limits.max_num_seqs))
        blocks = 1 + count * -(-(length + DUMMY_OUTPUTS) // block_size)
        return length, count, KVCacheLayout(num_blocks=blocks, block_size=block_size, groups=self.kv_cache_groups())

    def _extreme_routings(self) -> Iterator[None]:
        """As many steps as it takes to have had every extreme of every layer of experts, each while the caller has it;
        one without experts."""
        layers = [(layer, layer.extremes) for layer in self._expert_layers]
        for number in range(max((len(extremes) for _, extremes in layers), default=1)):
            with ExitStack() as stack:
                for layer, extremes in layers:
                    stack.enter_context(layer.dealt(extremes[min(number, len(extremes) - 1)]))
                yield

    def initialize_cache(self, layout: KVCacheLayout) -> None:
        """Allocate the pool and the runner's buffers."""
        self.layout = layout
        self._build_runner(layout)

    @cached_property
    def _attention(self) -> tuple[set[AttentionProblem], Choice[type[AttentionBackend]]]:
        """What the layers of attention ask for, and the backend that was chosen for them."""
        problems = attention_problems(self._attention_layers, dtype=self.dtype, device=self.device,
                                      block_size=self.config.cache.block_size, cache_dtype=self.cache_dtype)
        return problems, choose_attention_backend(problems, self.config.device.attention_backend, self.host)

    def attention_report(self) -> AttentionReport:
        """For the load report; a model is loaded."""
        return attention_report(*self._attention, layers=len(self._attention_layers))

    def _build_runner(self, layout: KVCacheLayout) -> None:
        assert self.loaded is not None, "load_model comes first"
        config, layers = self.config, self._attention_layers
        backend = self._attention[1].chosen
        assert backend is not None
        processors = [
            self.host.resolve("logits_processor", name)(config.model.vocab_size, self.device)
            for name in config.model.logits_processors
        ]
        scheduler = config.scheduler
        self.runner = GPUModelRunner(
            self.loaded.model,
            backend(layers, layout, dtype=self.dtype, device=self.device, cache_dtype=self.cache_dtype),
            SamplingState(max_rows=scheduler.max_num_seqs, vocab_size=config.model.vocab_size, device=self.device,
                          processors=processors),
            max_num_seqs=scheduler.max_num_seqs, max_len=max(config.model.max_model_len, 1 + DUMMY_OUTPUTS),
            max_tokens=scheduler.max_num_batched_tokens, block_size=layout.block_size, device=self.device,
        )

    @property
    def _captures(self) -> bool:
        """Whether decode steps become CUDA graphs. Not where experts are counted: what pads a graph would be, too."""
        device = self.config.device
        return self.device.type == "cuda" and not device.enforce_eager and not device.expert_stats

    def warm_up(self) -> None:
        """Run prompts and a decode step, so that the first request meets warm kernels, and capture graphs."""
        assert self.layout is not None
        start = time.monotonic()
        for number, step in enumerate(self._warm_steps(self.layout)):
            self._run_dummy(step.tokens, step.prompts, chunk=step.chunk, decode=number == 0)
        log.info("warmed up in %.2f s", time.monotonic() - start)
        if self._captures:
            assert self.runner is not None
            self.runner.capture_graphs()
        self.expert_counts(reset=True)  # what ran until now was nobody's request

    def _warm_steps(self, layout: KVCacheLayout) -> list[WarmStep]:
        """What to warm up by, smallest first; one step where nothing is compiled when it is met."""
        limits, met = self.config.scheduler, self.device.type == "cuda"
        most = limits.max_num_batched_tokens
        steps = warm_steps(max_tokens=most if met else min(WARM_TOKENS, most),
                           max_seqs=limits.max_num_seqs if met else 1,
                           longest=self.config.model.max_model_len - DUMMY_OUTPUTS, block_size=layout.block_size,
                           num_blocks=layout.num_blocks, spare=DUMMY_OUTPUTS)
        return steps if met else [step for step in steps if not step.chunk][-1:]

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        """Read the counts of every layer of experts, in one copy from the device; `reset` to begin anew.

        [] without --expert-stats or without experts.
        """
        tallies = {layer.name: layer.counts for layer in self._expert_layers if layer.counts is not None}
        if not tallies:
            return []
        read = torch.cat(list(tallies.values())).cpu().split([len(tally) for tally in tallies.values()])
        if reset:
            for tally in tallies.values():
                tally.zero_()
        return [ExpertCounts(layer=name, counts=counts.tolist()) for name, counts in zip(tallies, read)]

    def _run_dummy(self, length: int, count: int, *, chunk: int = 0, decode: bool = True) -> None:
        """`count` prompts of `length` tokens, the last `chunk` apart, then one step to `decode`, by the real path."""
        assert self.runner is not None
        block_size = self.config.cache.block_size
        per_request = -(-(length + DUMMY_OUTPUTS) // block_size)
        new = [
            NewRequest(request_id=f"warm-up-{i}", token_ids=[0] * length, num_prompt_tokens=length,
                       num_computed_tokens=0, params=SamplingParams(), seed=0, stop_token_ids=[],
                       bad_words_token_ids=[],
                       block_ids=(list(range(1 + i * per_request, 1 + (i + 1) * per_request)),))
            for i in range(count)
        ]
        ids = [request.request_id for request in new]
        self.runner.execute_model(Plan(step=0, request_ids=ids, num_tokens=[length - chunk] * count,
                                       num_computed=[0] * count, new_requests=new))
        for tokens, computed in [(chunk, length - chunk)] * (chunk > 0) + [(1, length)] * decode:
            self.runner.execute_model(Plan(step=0, request_ids=ids, num_tokens=[tokens] * count,
                                           num_computed=[computed] * count))
        self.runner.execute_model(Plan(step=0, request_ids=[], num_tokens=[], num_computed=[],
                                       finished_request_ids=ids))

    def execute_model(self, plan: Plan) -> Result:
        return self.launch(plan)()

    def launch(self, plan: Plan) -> Callable[[], Result]:
        """Start a step; what is returned waits for its result. The next may be started before that is called."""
        assert self.runner is not None, "initialize_cache comes first"
        return self.runner.launch(plan)
