"""StepStats: what one engine step did; read by the log line, /metrics and `nybble_step_done` plugins."""

from __future__ import annotations

import msgspec


class StepStats(msgspec.Struct, kw_only=True):
    """Counters of one step (`*_tokens`, `num_preempted`, `prefix_*`) and levels after it (the rest)."""

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    kv_usage: float = 0.0
    schedule_seconds: float = 0.0
    execute_seconds: float = 0.0

    def levels(self) -> StepStats:
        """The same levels with every counter at 0, so that nothing is counted twice."""
        return StepStats(step=self.step, num_running=self.num_running, num_waiting=self.num_waiting,
                         kv_usage=self.kv_usage)
