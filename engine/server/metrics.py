"""/metrics: vLLM's names with the prefix `nybble:`, in a registry of this server's own."""

from __future__ import annotations

import time
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..metrics import StepStats
from ..request import RequestOutput

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class ServerMetrics:
    """Engine steps and requests as Prometheus sees them. Times in seconds."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        registry, label = self.registry, ("model_name",)

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"nybble:{name}", help, label, registry=registry).labels(model_name)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"nybble:{name}", help, label, registry=registry).labels(model_name)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            whole = Histogram(f"nybble:{name}", help, label, registry=registry, buckets=buckets)
            return whole.labels(model_name)

        self.running = gauge("num_requests_running", "Requests in the last step")
        self.waiting = gauge("num_requests_waiting", "Requests waiting to be scheduled")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV-cache blocks in use; 1 is all")
        self.loop_lag = gauge("event_loop_lag_seconds", "How late the server's event loop last woke up")
        self.preemptions = counter("num_preemptions", "Requests that lost their KV blocks to others")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed")
        self.generated_tokens = counter("generation_tokens", "Tokens generated")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self.itl = histogram(
            "inter_token_latency_seconds", "Gap between outputs of a streamed request", ITL_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token", E2E_BUCKETS)
        self._success = Counter(
            "nybble:request_success",
            "Completions that ended, by reason",
            ("model_name", "finished_reason"),
            registry=registry,
        )
        self._model_name = model_name

    def on_step(self, stats: StepStats) -> None:
        """Listener for `AsyncLLM.add_stats_listener`."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.kv_usage.set(stats.kv_usage)
        self.preemptions.inc(stats.num_preempted)
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.generated_tokens.inc(stats.generated_tokens)
        self.prefix_queries.inc(stats.prefix_queries)
        self.prefix_hits.inc(stats.prefix_hits)

    def finished(self, reason: str, count: int = 1) -> None:
        self._success.labels(self._model_name, reason).inc(count)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class RequestClock:
    """Times the `completions` of one prompt; leaving the `with` block counts unfinished ones as aborted."""

    def __init__(self, metrics: ServerMetrics, completions: int) -> None:
        self._metrics, self._open = metrics, completions
        self._began = self._last = time.monotonic()
        self._seen_first = False

    def __enter__(self) -> RequestClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._metrics.finished(
                "abort" if kind is None or not issubclass(kind, Exception) else "error", self._open
            )

    def observe(self, output: RequestOutput) -> None:
        """Take note of an output; the engine's own times are used where it gives them."""
        now = time.monotonic()
        times = output.metrics
        if not self._seen_first:
            self._seen_first = True
            first = now - self._began
            if times is not None and times.first_token_time is not None:
                first = times.first_token_time - times.arrival_time
            self._metrics.ttft.observe(first)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        for completion in output.outputs:
            if completion.finish_reason is not None:
                self._open -= 1
                self._metrics.finished(completion.finish_reason)
        if output.finished:
            self._metrics.e2e.observe(now - self._began)
