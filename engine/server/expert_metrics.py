"""The experts' part of /metrics: asked for at scrape time, and never waited for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...plugins.errors import NybbleError
from ...plugins.log import get_logger
from ..expert_stats import ExpertCounts

logger = get_logger(__name__)
CACHE_SECONDS = 1.0
WAIT_SECONDS = 0.5


class ExpertMetrics(Collector):
    """The last known expert counts; nothing before there are any.

    The engine is asked once in CACHE_SECONDS at most, and waited for WAIT_SECONDS: one that is busy longer answers for
    a later scrape, and is not asked again before it has. A reset of the counts looks like a restart to Prometheus.
    """

    def __init__(self, model_name: str, ask: Callable[[], Awaitable[list[ExpertCounts]]]) -> None:
        self._model_name, self._ask = model_name, ask
        self._layers: Sequence[ExpertCounts] = ()
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Returns when the counts are fresh enough, or after WAIT_SECONDS."""
        if self._asking is None:
            if time.monotonic() - self._asked < CACHE_SECONDS:
                return
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(self._update())
        await asyncio.wait((self._asking,), timeout=WAIT_SECONDS)

    async def _update(self) -> None:
        try:
            self._layers = await self._ask()
        except NybbleError as error:  # a dead engine, or a model without experts: /metrics still has the rest
            logger.debug("no expert counts for /metrics: %s", error)
        finally:
            self._asking = None

    def collect(self) -> Iterator[Metric]:
        """`nybble:expert_tokens_total` by expert, `nybble:expert_imbalance` and `nybble:dead_experts` by layer."""
        if not self._layers:
            return
        labels = ("model_name", "layer")
        tokens = CounterMetricFamily("nybble:expert_tokens", "Tokens of an expert", labels=(*labels, "expert"))
        imbalance = GaugeMetricFamily("nybble:expert_imbalance", "Busiest expert's tokens over the mean", labels=labels)
        dead = GaugeMetricFamily("nybble:dead_experts", "Experts without a token", labels=labels)
        for layer in self._layers:
            own = (self._model_name, layer.layer)
            for number, count in enumerate(layer.counts):
                tokens.add_metric((*own, str(number)), count)
            imbalance.add_metric(own, layer.imbalance)
            dead.add_metric(own, len(layer.dead))
        yield from (tokens, imbalance, dead)
