"""UniProcExecutor: one worker in this process."""

from __future__ import annotations

from collections.abc import Callable

from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..plan import Plan, Result
from ..worker.gpu_worker import GPUWorker
from .base import Executor, plan_layout


class UniProcExecutor(Executor):
    """Calls the worker directly."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        self.worker = GPUWorker(config, host)
        self.worker.load_model()
        assert self.worker.loaded is not None
        self.load_report, self.layers = self.worker.loaded.report, self.worker.loaded.layers
        self.worker.compile_kernels()
        self.layout = plan_layout(config, self.worker.kv_cache_groups(), self.worker.available_kv_bytes())
        self.worker.initialize_cache(self.layout)
        self.attention = self.worker.attention_report()
        self.worker.warm_up()

    def execute_model(self, plan: Plan) -> Result:
        return self.worker.execute_model(plan)

    def launch(self, plan: Plan) -> Callable[[], Result]:
        return self.worker.launch(plan)

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        return self.worker.expert_counts(reset)

    def shutdown(self) -> None:
        self.worker.runner = None
        self.worker.loaded = None
