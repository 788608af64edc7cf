"""The steps that a start runs for their kernels: of every size that a request may bring, and none that cannot be."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.plan import KVCacheLayout
from nybble.engine.worker import gpu_worker
from nybble.engine.worker.decode_graphs import DecodeGraphs, graph_sizes
from nybble.engine.worker.gpu_worker import DUMMY_OUTPUTS, GPUWorker


def worker_of(device, *, max_tokens=8192, max_seqs=256, max_len=4096):
    worker = GPUWorker.__new__(GPUWorker)
    worker.device, worker.runner = torch.device(device), None
    worker.config = SimpleNamespace(
        scheduler=SimpleNamespace(max_num_batched_tokens=max_tokens, max_num_seqs=max_seqs),
        model=SimpleNamespace(max_model_len=max_len))
    return worker


def layout_of(blocks, block_size=16):
    return KVCacheLayout(num_blocks=blocks, block_size=block_size, groups=[None])


def test_every_power_of_two_is_some_prompts():
    steps = worker_of("cuda")._warm_steps(layout_of(10_000))
    assert steps == [(2, 1), (16, 1), (32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1), (2048, 1), (2048, 2),
                     (2730, 3)]
    assert worker_of("cpu")._warm_steps(layout_of(10_000)) == [(16, 1)]


@settings(max_examples=300, deadline=None)
@given(max_tokens=st.integers(1, 9000), max_seqs=st.integers(1, 300), max_len=st.integers(1, 5000),
       blocks=st.integers(1, 700), block_size=st.sampled_from([1, 16, 64]), device=st.sampled_from(["cpu", "cuda"]))
def test_a_step_is_one_that_could_be_planned(max_tokens, max_seqs, max_len, blocks, block_size, device):
    worker = worker_of(device, max_tokens=max_tokens, max_seqs=max_seqs, max_len=max_len)
    for length, count in worker._warm_steps(layout_of(blocks, block_size)):
        assert length >= 1 and 1 <= count <= max_seqs and length * count <= max_tokens
        assert length + DUMMY_OUTPUTS <= max_len
        assert count * -(-(length + DUMMY_OUTPUTS) // block_size) <= blocks - 1


def test_a_run_on_zeros_that_fails_costs_only_the_head_start(monkeypatch, caplog):
    worker, ran = worker_of("cuda"), []

    def run(length, count, *, decode):
        ran.append((length, count, decode))
        raise ValueError("zeros are no table")

    monkeypatch.setattr(gpu_worker, "compiled_ahead", lambda device: nullcontext())
    monkeypatch.setattr(worker, "_largest_step", lambda: (8, 1, layout_of(10)))
    monkeypatch.setattr(worker, "_build_runner", lambda layout: setattr(worker, "runner", object()))
    monkeypatch.setattr(worker, "_run_dummy", run)
    with caplog.at_level(logging.WARNING):
        worker.compile_kernels()
    assert ran == [(8, 1, False)] and worker.runner is None
    assert "one after another, since a run on zeros failed: ValueError: zeros are no table" in caplog.text


@pytest.mark.parametrize("most", [1, 7, 16, 100, 256, 512])
def test_decoding_is_rehearsed_at_powers_of_two_and_the_most(monkeypatch, most):
    graphs, ran = DecodeGraphs.__new__(DecodeGraphs), []
    monkeypatch.setattr(graphs, "_inputs", lambda size: size)
    monkeypatch.setattr(graphs, "_step", ran.append)
    graphs.rehearse(most)
    assert ran == sorted(ran, reverse=True) and ran[0] == most and set(ran) <= set(graph_sizes(most))
    assert {1 << i for i in range(most.bit_length() - 1)} & set(graph_sizes(most)) <= set(ran)
