"""KV memory is what the most expensive routing leaves: measured by a fake device through the real worker."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.args import EngineArgs
from nybble.engine.plan import KVCacheLayout
from nybble.engine.worker.device_memory import Room
from nybble.engine.worker.gpu_worker import GPUWorker
from nybble.plugins.errors import OutOfMemoryError
from nybble.plugins.manager import PluginHost

EXPERTS, TOP_K, TOKENS, SHARE = 8, 2, 40, 0.5
USED, TOTAL = 10_000_000, 50_000_000


class FakeMemory:
    """Only what `take` says is allocated, and the cache of the profile step."""

    def __init__(self) -> None:
        self.begun = self.cache = self.most = 0

    def begin(self) -> None:
        self.begun += 1
        self.most = 0

    def take(self, nbytes: int) -> None:
        assert self.begun, "nothing runs before the measurement begins"
        self.most = max(self.most, nbytes)

    def peak(self) -> int:
        return self.cache + self.most

    def room(self) -> Room:
        return Room(used=USED, total=TOTAL)


class Recording:
    """A backend that notes the tokens of every expert and takes memory by them."""

    rounding = None

    def __init__(self, backend, memory, cost) -> None:
        self.backend, self.memory, self.cost, self.seen = backend, memory, cost, []

    def run_all(self, x, weights, experts, beside):
        counts = torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
        self.seen.append(counts)
        self.memory.take(self.cost(counts))
        return self.backend.run_all(x, weights, experts, beside)


def worker_of(folder, **settings):
    host = PluginHost.load(allow="")
    args = EngineArgs(model=str(folder), device="cpu", dtype="float32", use_tqdm_on_load=False,
                      max_num_batched_tokens=TOKENS, max_num_seqs=4, gpu_memory_utilization=SHARE,
                      skip_tokenizer_init=True, **settings)
    worker = GPUWorker(args.create_engine_config(host), host)
    worker.load_model()
    worker.memory = FakeMemory()
    block = worker.config.cache.block_size
    blocks = 1 + -(-(TOKENS + 2) // block)
    worker.memory.cache = blocks * sum(g.spec.bytes_per_block(block) * len(g.layers) for g in worker.kv_cache_groups())
    return worker


def record(worker, cost):
    """A recording backend in every layer of experts."""
    made = []
    for layer in worker._expert_layers:
        [(backend, local)] = layer.runs
        made.append(Recording(backend, worker.memory, cost))
        layer.runs = [(made[-1], local)]
    return made


@pytest.fixture(scope="module")
def mixtral(make_checkpoint):
    return make_checkpoint("Mixtral", num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)


@pytest.mark.parametrize("cost, worst", [
    (lambda counts: max(counts) * 50_000, TOKENS * 50_000),  # `reference`: one expert after another
    (lambda counts: sum(count > 0 for count in counts) * 200_000, EXPERTS * 200_000),  # padding of every expert
    (lambda counts: sum(counts) * 10_000, TOKENS * TOP_K * 10_000),  # whatever the routing
], ids=["crowded", "spread", "either"])
def test_the_most_expensive_routing_is_kept_free(mixtral, cost, worst):
    worker = worker_of(mixtral)
    record(worker, cost)
    assert worker.available_kv_bytes() == int(TOTAL * SHARE) - USED - worst
    assert worker.memory.begun == 1 and worker.runner is None


def test_what_a_backend_sees(mixtral):
    worker = worker_of(mixtral)
    backends = record(worker, lambda counts: 0)
    worker.available_kv_bytes()
    for backend in backends:
        prompts = [counts for counts in backend.seen if sum(counts) == TOKENS * TOP_K]
        assert prompts == [[TOKENS * TOP_K // EXPERTS] * EXPERTS, [TOKENS] * TOP_K + [0] * (EXPERTS - TOP_K)]
        backend.seen.clear()
    worker._build_runner(KVCacheLayout(num_blocks=1 + TOKENS, block_size=worker.config.cache.block_size,
                                       groups=worker.kv_cache_groups()))
    worker._run_dummy(TOKENS, 1)
    chosen = [backend.seen[0] for backend in backends]
    assert all(sum(counts) == TOKENS * TOP_K for counts in chosen)
    assert any(counts not in prompts for counts in chosen), "afterwards the router decides again"


def test_a_model_without_experts_is_measured_by_one_step(llama, monkeypatch):
    worker, ran = worker_of(llama), []
    run = worker._run_dummy
    monkeypatch.setattr(worker, "_run_dummy", lambda *sizes: (ran.append(sizes), worker.memory.take(7), run(*sizes)))
    assert worker.available_kv_bytes() == int(TOTAL * SHARE) - USED - 7
    assert ran == [(TOKENS, 1)]


def test_a_routing_that_leaves_nothing_is_refused(mixtral):
    worker = worker_of(mixtral)
    record(worker, lambda counts: max(counts) * TOTAL)
    with pytest.raises(OutOfMemoryError, match=r"(?s)no memory is left for the KV cache.*lower --max-num-batched"):
        worker.available_kv_bytes()
