"""EngineCore: the loop of schedule, execute, update, in whatever process it runs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ...plugins import env
from ...plugins.errors import RequestError
from ...plugins.log import get_logger
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..executor.base import Executor
from ..expert_stats import ExpertCounts
from ..metrics import StepStats
from ..request import EngineCoreOutput, EngineCoreRequest
from ..sched.scheduler import Scheduler

log = get_logger(__name__)


class EngineCore:
    """One model, one scheduler, one executor. Ready to step when constructed."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        start = time.monotonic()
        executor_class: type[Executor] = host.resolve("executor", config.parallel.executor)
        self.executor = executor_class(config, host)
        self.layout, self.layers = self.executor.layout, self.executor.layers
        self.scheduler = Scheduler(
            scheduler=config.scheduler, cache=config.cache, max_model_len=config.model.max_model_len,
            layout=self.layout, log_steps=env.read_flag("NYBBLE_LOG_SCHEDULER"),
            force_preempt=env.read_float("NYBBLE_TEST_FORCE_PREEMPT", low=0.0, high=1.0),
            strict_kv=env.read_flag("NYBBLE_STRICT_KV"), seed=config.model.seed,
        )
        self._step_done = host.step_done
        self._refused: list[EngineCoreOutput] = []
        log.info("engine ready in %.2f s", time.monotonic() - start)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request; one that is refused ends at the next step with the reason in its output."""
        try:
            self.scheduler.add_request(request)
        except RequestError as error:
            self._refused.append(EngineCoreOutput(
                request_id=request.request_id, new_token_ids=[], finish_reason="error", error=str(error),
                error_code=error.code or "invalid_request"))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """Forget requests at once; their blocks are free before the next step. Unknown ids are ignored."""
        self.scheduler.finish_requests(request_ids)

    def has_work(self) -> bool:
        return bool(self._refused) or self.scheduler.has_work()

    def step(self) -> list[EngineCoreOutput]:
        """Run one step and return what requests gained. An exception means the engine cannot go on."""
        refused, self._refused = self._refused, []
        start = time.monotonic()
        plan = self.scheduler.schedule()
        planned = time.monotonic()
        if not plan.request_ids and not plan.finished_request_ids:
            return refused
        try:
            result = self.executor.execute_model(plan)
        except Exception:
            log.error("a step failed; the scheduler was at:\n%s", self.scheduler.dump())
            raise
        outputs = self.scheduler.update(plan, result)
        self.stats.schedule_seconds = planned - start
        self.stats.execute_seconds = time.monotonic() - planned
        if self._step_done is not None:
            self._step_done(self.stats)
        return refused + outputs

    @property
    def stats(self) -> StepStats:
        return self.scheduler.stats

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while requests hold blocks."""
        return self.scheduler.reset_prefix_cache()

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        """What was counted of every layer of experts; none without --expert-stats or without experts."""
        return self.executor.expert_counts(reset)

    def shutdown(self) -> None:
        self.executor.shutdown()
