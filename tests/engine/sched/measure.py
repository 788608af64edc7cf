"""Prints what a scheduler step costs on one core: `PYTHONPATH=src python tests/engine/sched/measure.py`."""

from __future__ import annotations

import statistics
import time

from nybble.engine.config import CacheConfig, SchedulerConfig
from nybble.engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec, Result
from nybble.engine.request import EngineCoreRequest, SamplingParams
from nybble.engine.sched.scheduler import Scheduler


def measure(*, seqs: int, prompt: int, steps: int, caching: bool, drafts: int) -> str:
    """Median milliseconds of schedule() and update() over `steps` steps of `seqs` decoding requests."""
    spec = KVCacheSpec(shape=(2, 1, 8), dtype_bytes=2)
    scheduler = Scheduler(
        scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=seqs * prompt),
        cache=CacheConfig(enable_prefix_caching=caching),
        max_model_len=1 << 20,
        layout=KVCacheLayout(
            num_blocks=1 + seqs * ((prompt + (steps + 1) * (drafts + 1)) // 16 + 1),
            block_size=16,
            groups=[KVCacheGroup(layers=[0], spec=spec)],
        ),
    )
    params, tokens = SamplingParams(temperature=0.0), steps * (drafts + 1) + 2
    for i in range(seqs):
        scheduler.add_request(
            EngineCoreRequest(
                request_id=f"request-{i}",
                prompt_token_ids=[i * prompt + j for j in range(prompt)],
                params=params,
                seed=0,
                max_tokens=tokens,
                eos_token_ids=[1 << 30],
            )
        )
    times: list[tuple[float, float]] = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        result = Result(sampled={i: [7] * (len(plan.draft_token_ids.get(i, ())) + 1) for i in plan.request_ids})
        if drafts:
            result.draft_token_ids = {i: [7] * drafts for i in plan.request_ids}
        updating = time.perf_counter()
        outputs = scheduler.update(plan, result)
        times.append((planned - start, time.perf_counter() - updating))
        assert len(outputs) == seqs
    first, decode = times[0], list(zip(*times[1:]))
    schedule, update = (1e3 * statistics.median(t) for t in decode)
    worst = 1e3 * max(map(sum, times[1:]))
    return (
        f"{seqs} x {prompt} tokens, cache {'on' if caching else 'off'}, {drafts} drafts: "
        f"decode schedule {schedule:.3f} ms, update {update:.3f} ms (worst step {worst:.3f} ms); "
        f"admission schedule {1e3 * first[0]:.2f} ms, update {1e3 * first[1]:.2f} ms"
    )


if __name__ == "__main__":
    for caching in (True, False):
        for drafts in (0, 3):
            print(measure(seqs=256, prompt=100, steps=400, caching=caching, drafts=drafts))
