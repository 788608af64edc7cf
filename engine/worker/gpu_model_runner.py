"""One step on one device: plan -> batch -> model -> sampler -> result, which is read when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from ...csrc.sampling import take_pending
from ...models import Batch, CausalLM
from ..attention.base import AttentionBackend, StepShape
from ..plan import NewRequest, Plan, Result
from ..request import TokenLogprobLists
from ..sample import LogprobTensors, Sampler, SamplingState, to_lists, token_logprobs
from .decode_graphs import NO_TOKEN, CaptureReport, DecodeGraphs
from .input_batch import CachedRequestState, InputBatch
from .step_buffers import StepBuffers, StepInputs

# Rows of prompt logits held at once: bounds the memory of prompt_logprobs whatever the prompt's length.
PROMPT_LOGITS_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step has sampled, on its way to the host: request `states[i]` gets `codes[i]`, NO_TOKEN for none.

    `arrived` is when the codes are on the host; None where they are there already.
    """

    states: Sequence[CachedRequestState]
    codes: Tensor
    errors: dict[int, str]
    logprobs: LogprobTensors | None
    arrived: torch.cuda.Event | None


class GPUModelRunner:
    """Owns the batch and drives the model; the same code on CPU and CUDA.

    `launch` gives the device a step and `collect` waits for what it sampled: one step may be launched before the last
    one is collected, and finds the tokens it needs on the device.
    """

    def __init__(self, model: CausalLM, attention: AttentionBackend, sampling: SamplingState, *, max_num_seqs: int,
                 max_len: int, max_tokens: int, block_size: int, device: torch.device) -> None:
        self.model, self.attention, self.sampling, self.device = model, attention, sampling, device
        self.sampler = Sampler()
        self.requests: dict[str, CachedRequestState] = {}
        self.batch = InputBatch(max_rows=max_num_seqs, max_len=max_len, max_tokens=max_tokens, block_size=block_size,
                                device=device)
        self.buffers = StepBuffers(max_tokens=max_tokens, max_rows=max_num_seqs, device=device)
        self.sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.graphs = DecodeGraphs(model, attention, buffers=self.buffers, block_table=self.batch.block_table,
                                   sampled=self.sampled)
        self.capture_report: CaptureReport | None = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def rehearse_decoding(self) -> None:
        """Run decode steps of nobody's requests, with a backend that reads no lengths on the host."""
        if self.attention.capturable:
            self.graphs.rehearse(self.batch.max_rows)

    def capture_graphs(self) -> None:
        """Capture decode steps, on a device and with a backend that can."""
        if self.device.type == "cuda" and self.attention.capturable:
            self.capture_report = self.graphs.capture(self.batch.max_rows)

    def execute_model(self, plan: Plan) -> Result:
        """Run one step and wait for it."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Callable[[], Result]:
        """Give the device one step; what is returned waits for its result.

        A plan with nothing to compute only updates what is remembered.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copies out of the host buffers this step will overwrite
        self._update_states(plan)
        result = Result()
        if not plan.request_ids:
            return lambda: result
        sampled = self._run(result)
        return (lambda: result) if sampled is None else (lambda: self._collect(sampled, result))

    def _update_states(self, plan: Plan) -> None:
        """Bring rows in line with the plan: forget, add, extend, and set aside who does not run this step."""
        batch, requests = self.batch, self.requests
        for request_id in plan.finished_request_ids:
            if (gone := requests.pop(request_id, None)) is not None and gone.row is not None:
                self._remove_row(gone)
        for new in plan.new_requests:
            assert new.request_id not in requests
            requests[new.request_id] = CachedRequestState.start(new)
        for request_id, blocks in plan.new_block_ids.items():
            batch.append_blocks(requests[request_id], blocks)
        scheduled = [requests[request_id] for request_id in plan.request_ids]
        absent = [state for state in scheduled if state.row is None]
        if batch.num_rows + len(absent) != len(scheduled):
            for state in set(batch.states) - set(scheduled):
                self._remove_row(state)
        for state in absent:
            self.sampling.set_row(batch.add(state), self._resampled(state))
        if scheduled:
            order = np.fromiter((state.row for state in scheduled), np.int64, len(scheduled))
            batch.num_scheduled[order] = plan.num_tokens
            batch.num_computed[order] = plan.num_computed

    @staticmethod
    def _resampled(state: CachedRequestState) -> NewRequest:
        """The request as the sampler must see it now: with the tokens it has produced here since it arrived."""
        if len(state.token_ids) == len(state.request.token_ids):
            return state.request
        return msgspec.structs.replace(state.request, token_ids=state.token_ids)

    def _remove_row(self, state: CachedRequestState) -> None:
        hole, last = self.batch.remove(state)
        if hole == last:
            self.sampling.clear_row(hole)
        else:
            self.sampling.move_row(last, hole)

    def _run(self, result: Result) -> Sampled | None:
        """Launch the model, and the sampler for rows that reach their last token; fills in prompt log probabilities."""
        batch, count = self.batch, self.batch.num_rows
        query_lens = batch.num_scheduled[:count]
        rows = np.flatnonzero(batch.num_computed[:count] + query_lens == batch.num_tokens[:count])
        longest = int(query_lens.max())
        prompts = [state for state in batch.states if state.request.params.prompt_logprobs is not None]
        graph = self.graphs.find(count) if longest == 1 and not prompts else None
        inputs = self.buffers.lay_out(int(query_lens.sum()), count) if graph is None else graph.inputs
        batch.fill(inputs, rows)
        self.buffers.push(inputs)
        batch.block_table.push()
        if self._copied is not None:
            self._copied.record()
        last = inputs.last.device[: len(rows)]
        if graph is None:
            hidden = self._forward(inputs, query_lens, longest)
            for state in prompts:
                self._prompt_logprobs(state, hidden, inputs, result)
        else:
            graph.graph.replay()
        if not rows.size:
            return None
        metadata = self.sampling.metadata(rows, batch.num_tokens, batch.num_prompt, batch.token_ids)
        states = [batch.states[row] for row in rows.tolist()]
        batch.expect_tokens(rows)
        if graph is None:
            logits = self.model.compute_logits(hidden if len(rows) == len(hidden) else hidden[last])
        elif len(rows) < count:
            logits = graph.logits[last]
        elif metadata.is_greedy:
            return self._sent(states, graph.codes[:count])
        else:
            logits = graph.logits[:count]
        out = self.sampler.forward(logits, metadata)
        self.sampled[: len(rows)].copy_(out.token_ids)
        return self._sent(states, out.token_ids.masked_fill(out.invalid, NO_TOKEN), out.errors, out.logprobs)

    def _forward(self, inputs: StepInputs, query_lens: np.ndarray, longest: int) -> Tensor:
        batch, rows = self.batch, self.batch.num_rows
        step = StepShape(query_lens=query_lens, seq_lens=inputs.seq_lens.host,
                         block_table=batch.block_table.device[:rows],
                         host_block_table=batch.block_table.host[:rows], slots=inputs.slots.device,
                         query_start=inputs.query_start.device, device_seq_lens=inputs.seq_lens.device,
                         max_query_len=longest)
        ids = inputs.ids.device
        if (inputs.ids.host < 0).any():
            take_pending(ids, self.sampled)
        return self.model(Batch(ids=ids, positions=inputs.positions.device, attn=self.attention.prepare(step)))

    def _sent(self, states: Sequence[CachedRequestState], codes: Tensor, errors: dict[int, str] | None = None,
              logprobs: LogprobTensors | None = None) -> Sampled:
        """Start the way to the host of what was sampled."""
        if self.device.type == "cpu":
            return Sampled(states=states, codes=codes, errors=errors or {}, logprobs=logprobs, arrived=None)
        host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
        host.copy_(codes, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Sampled(states=states, codes=host, errors=errors or {}, logprobs=logprobs, arrived=arrived)

    @torch.inference_mode()
    def _collect(self, sampled: Sampled, result: Result) -> Result:
        """Wait for what a step sampled and record it everywhere."""
        if sampled.arrived is not None:
            sampled.arrived.synchronize()
        tokens, here = sampled.codes.tolist(), []
        for i, (state, token) in enumerate(zip(sampled.states, tokens)):
            request_id = state.request.request_id
            if token == NO_TOKEN:
                result.errors[request_id] = sampled.errors.get(i) or "the model produced NaN or no finite logits"
                continue
            result.sampled[request_id] = [token]
            self.batch.append_token(state, token)
            if state.row is not None:
                here.append((state.row, token))
        if here:
            self.sampling.observe(*np.asarray(here).T)
        if sampled.logprobs is not None:
            wanted = [state.request.params.logprobs for state in sampled.states]
            for state, lists in zip(sampled.states, to_lists(sampled.logprobs, wanted)):
                if lists is not None:
                    result.logprobs[state.request.request_id] = lists
        return result

    def _prompt_logprobs(self, state: CachedRequestState, hidden: Tensor, inputs: StepInputs, result: Result) -> None:
        """Log probabilities of the prompt tokens that this chunk's hidden states, of `hidden` [T, H], predict."""
        assert state.row is not None
        begin, end = inputs.query_start.host[state.row : state.row + 2].tolist()
        start, hidden = int(self.batch.num_computed[state.row]), hidden[begin:end]
        top, prompt = state.request.params.prompt_logprobs, state.request.num_prompt_tokens
        count = min(len(hidden), prompt - 1 - start)
        if top is None or count <= 0:
            return
        targets = torch.tensor(state.token_ids[start + 1 : start + 1 + count], device=self.device)
        found = TokenLogprobLists([], [], [])
        for at in range(0, count, PROMPT_LOGITS_ROWS):
            rows = slice(at, min(at + PROMPT_LOGITS_ROWS, count))
            tensors = token_logprobs(self.model.compute_logits(hidden[rows]), targets[rows], top)
            for lists in to_lists(tensors, [top] * (rows.stop - rows.start)):
                assert lists is not None
                found.token_ids.extend(lists.token_ids)
                found.logprobs.extend(lists.logprobs)
                found.ranks.extend(lists.ranks)
        result.prompt_logprobs[state.request.request_id] = found
