"""Expert counts over HTTP and in /metrics: fresh, reset, refused, and never in the way of a scrape."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace

import pytest

from nybble.engine.config import DeviceConfig
from nybble.engine.expert_stats import ExpertCounts, check_experts
from nybble.engine.server import app, expert_metrics
from nybble.plugins.errors import EngineDeadError


class Counted:
    """An engine's counts: `delay` seconds to answer, or `fault` instead."""

    def __init__(self) -> None:
        self.counts, self.delay, self.fault, self.asked = [6, 0, 2, 0], 0.0, None, 0

    async def __call__(self, reset):
        self.asked += 1
        found = [] if self.counts is None else [ExpertCounts(layer="layers.0", counts=self.counts)]
        await asyncio.sleep(self.delay)
        if self.fault is not None:
            raise self.fault
        if reset:
            self.counts = [0] * 4
        return check_experts(found)


@pytest.fixture
def counting(serve, server, monkeypatch):
    """A server whose engine counts, at `server.engine.counted`; nothing is cached between scrapes."""
    monkeypatch.setattr(expert_metrics, "CACHE_SECONDS", 0.0)
    config = replace(server.engine.config, device=DeviceConfig(expert_stats=True))
    return serve(counted=Counted(), config=config)


def scraped(server):
    """The experts' lines of /metrics: (name, expert or None) -> value."""
    text = server.http.get("/metrics").text
    assert "nybble:prompt_tokens_total" in text
    lines = re.findall(r'^nybble:(\w*expert\w*){(.*)} (.*)$', text, re.M)
    assert all('model_name="fake"' in labels and 'layer="layers.0"' in labels for _, labels, _ in lines)
    return {(name, m[1] if (m := re.search(r'expert="(\d+)"', labels)) else None): float(value)
            for name, labels, value in lines}


def metrics_of(counts):
    layer = ExpertCounts(layer="layers.0", counts=counts)
    tokens = {("expert_tokens_total", str(number)): count for number, count in enumerate(counts)}
    return tokens | {("expert_imbalance", None): layer.imbalance, ("dead_experts", None): len(layer.dead)}


def test_get_tells_and_post_resets(counting):
    told = {"layers": [{"layer": "layers.0", "counts": [6, 0, 2, 0], "total": 8, "imbalance": 3.0,
                        "variation": pytest.approx(1.2247, abs=1e-4), "dead": [1, 3]}]}
    for _ in range(2):
        assert counting.http.get("/nybble/experts?reset=1").json() == told
    assert counting.http.get("/nybble/experts/reset").status_code == 405
    assert counting.post("/nybble/experts/reset").json() == told
    assert counting.http.get("/nybble/experts").json()["layers"][0]["counts"] == [0] * 4


def test_what_is_refused_says_why(server, counting, monkeypatch):
    def error(which, path="/nybble/experts"):
        response = which.http.get(path)
        return response.status_code, response.json()["error"]["code"], response.json()["error"]["message"]

    status, code, message = error(server)
    assert (status, code) == (404, "no_expert_counts") and "--expert-stats" in message
    counting.engine.counted.counts = None
    assert error(counting)[:2] == (404, "no_expert_counts") and "no experts" in error(counting)[2]
    assert scraped(counting) == {}
    counting.engine.counted.delay = 30
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.05)
    assert error(counting)[:2] == (503, "engine_stalled")


def test_metrics_follow_the_counts(counting, server):
    assert scraped(counting) == metrics_of([6, 0, 2, 0])
    counting.engine.counted.counts = [7, 1, 2, 0]
    assert scraped(counting) == metrics_of([7, 1, 2, 0])
    assert scraped(server) == {}, "not without --expert-stats"


def test_scrapes_share_an_answer_for_a_second(counting, monkeypatch):
    monkeypatch.setattr(expert_metrics, "CACHE_SECONDS", 60.0)
    for _ in range(3):
        assert scraped(counting) == metrics_of([6, 0, 2, 0])
    assert counting.engine.counted.asked == 1


def test_a_busy_or_dead_engine_leaves_the_last_known(counting, monkeypatch):
    monkeypatch.setattr(expert_metrics, "WAIT_SECONDS", 0.05)
    engine, known = counting.engine, metrics_of([6, 0, 2, 0])
    assert scraped(counting) == known
    engine.counted.counts, engine.counted.delay = [9, 9, 9, 9], 1.0
    began = time.monotonic()
    assert scraped(counting) == scraped(counting) == known
    assert time.monotonic() - began < 0.9 and engine.counted.asked == 2, "one question at a time"
    counting.until(lambda: scraped(counting) == metrics_of([9, 9, 9, 9]))
    engine.counted.delay, engine.counted.fault = 0.0, EngineDeadError("gone")
    assert scraped(counting) == metrics_of([9, 9, 9, 9])
    asked, engine.is_running = engine.counted.asked, False
    assert scraped(counting) == metrics_of([9, 9, 9, 9]) and engine.counted.asked == asked
