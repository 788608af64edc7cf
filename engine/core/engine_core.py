"""EngineCore: the loop of schedule, execute, update, in whatever process it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from ...plugins import env
from ...plugins.errors import RequestError
from ...plugins.log import get_logger
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..executor.base import Executor
from ..expert_stats import ExpertCounts
from ..metrics import StepStats
from ..plan import Plan, Result
from ..request import EngineCoreOutput, EngineCoreRequest
from ..sched.scheduler import Scheduler

log = get_logger(__name__)


class Running(NamedTuple):
    """A step on the device: its plan, how to wait for its result, and what starting it took on the host."""

    plan: Plan
    wait: Callable[[], Result]
    schedule_seconds: float
    launch_seconds: float


class EngineCore:
    """One model, one scheduler, one executor. Ready to step when constructed."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        start = time.monotonic()
        executor_class: type[Executor] = host.resolve("executor", config.parallel.executor)
        self.executor = executor_class(config, host)
        self.layout, self.layers, self.attention = self.executor.layout, self.executor.layers, self.executor.attention
        self.scheduler = Scheduler(
            scheduler=config.scheduler, cache=config.cache, max_model_len=config.model.max_model_len,
            layout=self.layout, log_steps=env.read_flag("NYBBLE_LOG_SCHEDULER"),
            force_preempt=env.read_float("NYBBLE_TEST_FORCE_PREEMPT", low=0.0, high=1.0),
            strict_kv=env.read_flag("NYBBLE_STRICT_KV"), seed=config.model.seed,
        )
        self._step_done = host.step_done
        self._refused: list[EngineCoreOutput] = []
        self._run_ahead = config.scheduler.async_scheduling
        self._running: Running | None = None
        self.stats = StepStats()
        """Of the last step whose result came in."""
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
        return bool(self._refused) or self._running is not None or self.scheduler.has_work()

    def step(self) -> list[EngineCoreOutput]:
        """Run one step and return what requests gained. An exception means the engine cannot go on.

        With async scheduling a step is started before the one before it is waited for, so that the device always has
        one to go on with; what is returned is then of the step before.
        """
        refused, self._refused = self._refused, []
        running, self._running = self._running, None
        try:
            if running is None or self.scheduler.can_run_ahead:
                self._running = self._start()
                if running is None and not self._run_ahead:
                    running, self._running = self._running, None
            if running is not None:
                return refused + self._finish(running)
            self.stats = self.scheduler.levels()
            return refused
        except Exception:
            log.error("a step failed; the scheduler was at:\n%s", self.scheduler.dump())
            raise

    def _start(self) -> Running | None:
        """Plan the next step and give it to the device, if there is anything to do."""
        if not self.scheduler.has_work():
            return None
        start = time.monotonic()
        plan = self.scheduler.schedule()
        planned = time.monotonic()
        if not plan.request_ids and not plan.finished_request_ids:
            wait: Callable[[], Result] = Result
        elif self._run_ahead:
            wait = self.executor.launch(plan)
        else:
            wait = partial(self.executor.execute_model, plan)
        return Running(plan, wait, planned - start, time.monotonic() - planned)

    def _finish(self, running: Running) -> list[EngineCoreOutput]:
        """Wait for a step's result and take it in."""
        start = time.monotonic()
        result = running.wait()
        waited = time.monotonic() - start
        outputs = self.scheduler.update(running.plan, result)
        self.stats = self.scheduler.stats
        self.stats.schedule_seconds = running.schedule_seconds
        self.stats.execute_seconds = running.launch_seconds + waited
        if self._step_done is not None:
            self._step_done(self.stats)
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while requests hold blocks."""
        return self.scheduler.reset_prefix_cache()

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        """What was counted of every layer of experts; none without --expert-stats or without experts."""
        return self.executor.expert_counts(reset)

    def shutdown(self) -> None:
        self._running = None  # it holds on to the runner
        self.executor.shutdown()
