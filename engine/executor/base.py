"""The executor protocol, and how a cache pool is sized from what the workers report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ...plugins.errors import OutOfMemoryError
from ...plugins.log import get_logger
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..layer_report import AttentionReport, LayerReport
from ..loader.base import LoadReport
from ..plan import KVCacheGroup, KVCacheLayout, Plan, Result

log = get_logger(__name__)


class Executor(ABC):
    """Runs plans on one or many workers. A plugin of kind "executor"."""

    @abstractmethod
    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        """Load the model on every worker, agree on a cache layout, allocate, warm up: ready when it returns."""

    layout: KVCacheLayout
    load_report: LoadReport
    layers: tuple[LayerReport, ...]
    attention: AttentionReport | None = None

    @abstractmethod
    def execute_model(self, plan: Plan) -> Result:
        """Run one step on every worker."""

    def launch(self, plan: Plan) -> Callable[[], Result]:
        """Start one step; what is returned waits for its result.

        The next step may be started before, once. An executor that cannot do that runs the step here and now.
        """
        result = self.execute_model(plan)
        return lambda: result

    @abstractmethod
    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        """What one worker's layers of experts counted, `reset` to begin anew; none where nothing is counted."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release every worker."""


def plan_layout(config: EngineConfig, groups: list[KVCacheGroup], available_bytes: int) -> KVCacheLayout:
    """The pool that fits: the smallest of the workers' memory must be passed in.

    Never larger than `max_num_seqs` requests of full length could fill. Raises OutOfMemoryError when not even one
    block and the null block fit, with the sum.
    """
    cache, scheduler = config.cache, config.scheduler
    block_size = cache.block_size
    per_block = sum(group.spec.bytes_per_block(block_size) * len(group.layers) for group in groups)
    useful = 1 + scheduler.max_num_seqs * -(-config.model.max_model_len // block_size)
    blocks = cache.num_gpu_blocks or min(available_bytes // per_block, useful)
    if blocks < 2:
        raise OutOfMemoryError(
            "the KV cache does not fit", found=f"{available_bytes} bytes for blocks of {per_block} bytes; 2 are needed",
            fix="raise --kv-cache-memory-bytes or --gpu-memory-utilization",
        )
    layout = KVCacheLayout(num_blocks=blocks, block_size=block_size, groups=groups)
    if layout.max_tokens < config.model.max_model_len:
        log.warning("the KV cache holds %d tokens, less than max_model_len %d: longer prompts are refused",
                    layout.max_tokens, config.model.max_model_len)
    log.info("KV cache: %d blocks of %d tokens, %.2f GiB, %d tokens", blocks, block_size, blocks * per_block / 2**30,
             layout.max_tokens)
    return layout
