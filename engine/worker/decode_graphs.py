"""CUDA graphs of decode steps: one for each of a few batch sizes, replayed on fixed buffers for any batch that fits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ...csrc.sampling import take_pending
from ...models import Batch, CausalLM
from ...plugins.log import get_logger
from ..attention.base import AttentionBackend, StepShape
from ..sample import Sampler, SamplingMetadata
from .input_batch import BlockTable
from .step_buffers import StepBuffers, StepInputs
from .warm_steps import rehearsal_sizes

log = get_logger(__name__)

NO_TOKEN = -1
"""What stands for the token of a row whose logits were unusable."""


class CaptureReport(msgspec.Struct, frozen=True, kw_only=True):
    """What capturing took: batch sizes, seconds, and bytes of device memory that the graphs keep."""

    sizes: tuple[int, ...]
    seconds: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class DecodeGraph:
    """A decode step of `size` requests. `logits` [size, V]; `codes` [size]: the likeliest token, or NO_TOKEN."""

    size: int
    inputs: StepInputs
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    codes: Tensor


def graph_sizes(most: int) -> list[int]:
    """Batch sizes to capture up to `most`: a step is padded by at most a quarter of itself, or seven rows."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32)]
    return [size for size in sizes if size < most] + [most] if most <= 512 else sizes


class DecodeGraphs:
    """Graphs by batch size, on the runner's buffers; none until `capture`.

    A graph holds the model, its logits and the greedy choice, which is also left in `sampled` for the next step.
    """

    def __init__(self, model: CausalLM, attention: AttentionBackend, *, buffers: StepBuffers, block_table: BlockTable,
                 sampled: Tensor) -> None:
        self.model, self.attention, self.buffers = model, attention, buffers
        self.block_table, self.sampled = block_table, sampled
        self._sampler = Sampler()
        self._graphs: list[DecodeGraph] = []  # by size

    def find(self, rows: int) -> DecodeGraph | None:
        """The smallest graph that `rows` requests fit in."""
        return next((graph for graph in self._graphs if graph.size >= rows), None)

    @torch.inference_mode()
    def rehearse(self, most: int) -> None:
        """Run what `capture` would record, for all kernels that up to `most` requests need."""
        for size in reversed(rehearsal_sizes(most)):
            self._step(self._inputs(size))

    @torch.inference_mode()
    def capture(self, most: int) -> CaptureReport:
        """Capture every size up to `most` requests, the largest first: the others' memory then fits in its.

        A model that cannot be captured (a kernel waits for the device) runs without graphs, and the log says so.
        """
        start, device = time.monotonic(), self.sampled.device
        before = torch.cuda.current_stream(device)
        free = torch.cuda.mem_get_info(device)[0]
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        try:
            graphs = [self._capture(size, pool, stream) for size in reversed(graph_sizes(most))]
            self._graphs = graphs[::-1]
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch leaves a capture that broke down on the capture's stream
            log.warning("decoding runs without CUDA graphs, since it cannot be captured: %s", error)
        torch.cuda.synchronize(device)
        report = CaptureReport(sizes=tuple(graph.size for graph in self._graphs), seconds=time.monotonic() - start,
                               num_bytes=max(0, free - torch.cuda.mem_get_info(device)[0]))
        log.info("captured %d CUDA graphs of up to %d requests in %.1f s, %.2f GiB", len(report.sizes),
                 max(report.sizes, default=0), report.seconds, report.num_bytes / 2**30)
        return report

    def _inputs(self, size: int) -> StepInputs:
        """Of nobody's requests: they write to the null block and attend to nothing."""
        inputs = self.buffers.lay_out(size, size)
        for mirror in inputs[:-1]:
            mirror.host[:] = 0
        inputs.query_start.host[:] = np.arange(size + 1)
        self.buffers.push(inputs)
        return inputs

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> DecodeGraph:
        inputs = self._inputs(size)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(inputs)  # compiles kernels and makes workspaces
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits, codes = self._step(inputs)
        return DecodeGraph(size=size, inputs=inputs, graph=graph, logits=logits, codes=codes)

    def _step(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        size = len(inputs.seq_lens.host)
        ones = np.ones(size, np.int32)
        step = StepShape(query_lens=ones, seq_lens=ones, block_table=self.block_table.device[:size],
                         host_block_table=self.block_table.host[:size], slots=inputs.slots.device,
                         query_start=inputs.query_start.device, device_seq_lens=inputs.seq_lens.device,
                         max_query_len=1)
        batch = Batch(ids=take_pending(inputs.ids.device, self.sampled), positions=inputs.positions.device,
                      attn=self.attention.prepare(step))
        logits = self.model.compute_logits(self.model(batch))
        out = self._sampler(logits, SamplingMetadata(num_rows=size))
        self.sampled[:size].copy_(out.token_ids)
        return logits, out.token_ids.masked_fill(out.invalid, NO_TOKEN)
