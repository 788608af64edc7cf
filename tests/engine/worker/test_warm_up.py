"""The steps that a start runs for their kernels: of every size that a request may bring, and none that cannot be."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nybble.engine.plan import KVCacheLayout
from nybble.engine.worker import gpu_worker
from nybble.engine.worker.decode_graphs import DecodeGraphs, graph_sizes
from nybble.engine.worker.gpu_worker import DUMMY_OUTPUTS, GPUWorker
from nybble.engine.worker.warm_steps import rehearsal_sizes
from nybble.models.decoder import DecoderLM


def worker_of(device, *, max_tokens=8192, max_seqs=256, max_len=4096):
    worker = GPUWorker.__new__(GPUWorker)
    worker.device, worker.runner = torch.device(device), None
    worker.config = SimpleNamespace(
        scheduler=SimpleNamespace(max_num_batched_tokens=max_tokens, max_num_seqs=max_seqs),
        model=SimpleNamespace(max_model_len=max_len))
    return worker


class Stack(DecoderLM):
    """Layers that are all alike."""

    def __init__(self, layers: int) -> None:
        super().__init__(embed=None, rotary=None, layers=[torch.nn.Identity() for _ in range(layers)], norm=None,
                         head=None)


def layout_of(blocks, block_size=16):
    return KVCacheLayout(num_blocks=blocks, block_size=block_size, groups=[None])


def test_steps_of_a_common_start():
    steps = worker_of("cuda")._warm_steps(layout_of(10_000))
    plain = [(tokens, prompts) for tokens, prompts, chunk in steps if not chunk]
    assert plain == [(2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (192, 1), (256, 1), (2, 256),
                     (512, 1), (1024, 1), (2048, 1), (16, 256), (2048, 2), (2730, 3)]
    assert [step for step in steps if step.chunk] == [(1024, 1, 2), (1024, 1, 50)]
    assert worker_of("cpu")._warm_steps(layout_of(10_000)) == [(16, 1, 0)]


@settings(max_examples=300, deadline=None)
@example(max_tokens=2, max_seqs=2, max_len=3, blocks=3, block_size=16, device="cpu")  # two prompts of one token fit
@given(max_tokens=st.integers(1, 9000), max_seqs=st.integers(1, 300), max_len=st.integers(1, 5000),
       blocks=st.integers(1, 700), block_size=st.sampled_from([1, 16, 64]), device=st.sampled_from(["cpu", "cuda"]))
def test_a_step_is_one_that_could_be_planned(max_tokens, max_seqs, max_len, blocks, block_size, device):
    worker = worker_of(device, max_tokens=max_tokens, max_seqs=max_seqs, max_len=max_len)
    steps = worker._warm_steps(layout_of(blocks, block_size))
    for length, count, chunk in steps:
        assert length >= 1 and 1 <= count <= max_seqs and length * count <= max_tokens and 0 <= chunk < length
        assert length + DUMMY_OUTPUTS <= max_len
        assert count * -(-(length + DUMMY_OUTPUTS) // block_size) <= blocks - 1
    room = min(max_tokens, max_len - DUMMY_OUTPUTS, (blocks - 1) * block_size - DUMMY_OUTPUTS)
    assert bool(steps) is (room > 0) and (device == "cuda" or len(steps) <= 1)


@pytest.mark.parametrize("length, chunk, decode, expected", [
    (8, 0, False, [([8, 8], [0, 0])]),
    (8, 3, False, [([5, 5], [0, 0]), ([3, 3], [5, 5])]),
    (8, 3, True, [([5, 5], [0, 0]), ([3, 3], [5, 5]), ([1, 1], [8, 8])]),
])
def test_plans_of_a_dummy_step(length, chunk, decode, expected):
    plans = []
    worker = worker_of("cuda")
    worker.config.cache = SimpleNamespace(block_size=16)
    worker.runner = SimpleNamespace(execute_model=plans.append)
    worker._run_dummy(length, 2, chunk=chunk, decode=decode)
    *steps, last = plans
    assert [(plan.num_tokens, plan.num_computed) for plan in steps] == expected
    assert last.finished_request_ids == steps[0].request_ids and len(steps[0].new_requests) == 2


def test_a_run_on_zeros_that_fails_costs_only_the_head_start(monkeypatch, caplog):
    worker, ran = worker_of("cuda"), []
    model = Stack(3)
    worker.loaded = SimpleNamespace(model=model)

    def run(length, count, *, chunk, decode):
        ran.append((length, count, chunk, decode, len(model.layers)))
        raise ValueError("zeros are no table")

    monkeypatch.setattr(gpu_worker, "compiled_ahead", lambda device: nullcontext())
    monkeypatch.setattr(worker, "_largest_step", lambda: (8, 1, layout_of(10)))
    monkeypatch.setattr(worker, "_build_runner", lambda layout: setattr(worker, "runner", object()))
    monkeypatch.setattr(worker, "_run_dummy", run)
    with caplog.at_level(logging.WARNING):
        worker.compile_kernels()
    assert ran == [(8, 1, 0, False, 2)] and worker.runner is None and len(model.layers) == 3
    assert "one after another, since a run on zeros failed: ValueError: zeros are no table" in caplog.text


def test_a_start_can_do_without(monkeypatch):
    monkeypatch.setenv("NYBBLE_COMPILE_AHEAD", "0")
    worker_of("cuda").compile_kernels()  # a worker without a model could not run a step


@pytest.mark.parametrize("most", [1, 7, 16, 100, 256, 512])
def test_what_decoding_is_rehearsed_by(monkeypatch, most):
    graphs, ran = DecodeGraphs.__new__(DecodeGraphs), []
    monkeypatch.setattr(graphs, "_inputs", lambda size: size)
    monkeypatch.setattr(graphs, "_step", ran.append)
    graphs.rehearse(most)
    assert ran == sorted(rehearsal_sizes(most), reverse=True) and ran[0] == most and ran[-1] == 1
    for size in graph_sizes(most):  # none is far from one that was run
        assert any(size <= near < 1.5 * size + 1 for near in ran)
