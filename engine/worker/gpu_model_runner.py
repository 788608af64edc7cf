"""One step on one device: plan -> batch -> model -> sampler -> result."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from ...models import Batch, CausalLM
from ..attention.base import AttentionBackend, StepShape
from ..plan import NewRequest, Plan, Result
from ..request import TokenLogprobLists
from ..sample import Sampler, SamplingState, to_lists, token_logprobs
from .input_batch import CachedRequestState, InputBatch

# Rows of prompt logits held at once: bounds the memory of prompt_logprobs whatever the prompt's length.
PROMPT_LOGITS_ROWS = 256


class GPUModelRunner:
    """Owns the batch and drives the model; the same code on CPU and CUDA."""

    def __init__(self, model: CausalLM, attention: AttentionBackend, sampling: SamplingState, *, max_num_seqs: int,
                 max_len: int, max_tokens: int, block_size: int, device: torch.device) -> None:
        self.model, self.attention, self.sampling, self.device = model, attention, sampling, device
        self.sampler = Sampler()
        self.requests: dict[str, CachedRequestState] = {}
        self.batch = InputBatch(max_rows=max_num_seqs, max_len=max_len, max_tokens=max_tokens, block_size=block_size,
                                device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    @torch.inference_mode()
    def execute_model(self, plan: Plan) -> Result:
        """Run one step. A plan with nothing to compute only updates what is remembered."""
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copies out of the host buffers this step will overwrite
        self._update_states(plan)
        result = Result()
        if not plan.request_ids:
            return result
        query_lens, ends = self.batch.prepare()
        rows, seq_lens = self.batch.num_rows, self.batch.num_computed[: self.batch.num_rows] + query_lens
        hidden = self._forward(query_lens, seq_lens, int(ends[-1]))
        for row in range(rows) if self._wants_prompt_logprobs else ():
            self._prompt_logprobs(row, hidden[int(ends[row] - query_lens[row]) : int(ends[row])], result)
        sampling = np.flatnonzero(seq_lens == self.batch.num_tokens[:rows])
        if sampling.size:
            self._sample(hidden, sampling, ends, result)
        return result

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

    @property
    def _wants_prompt_logprobs(self) -> bool:
        return any(s.request.params.prompt_logprobs is not None for s in self.batch.states)

    def _forward(self, query_lens: np.ndarray, seq_lens: np.ndarray, total: int) -> Tensor:
        batch, rows = self.batch, self.batch.num_rows
        step = StepShape(query_lens=query_lens, seq_lens=seq_lens, block_table=batch.block_table.push(rows),
                         host_block_table=batch.block_table.host[:rows], slots=batch.slots.push(total),
                         query_start=batch.query_start.push(rows + 1), device_seq_lens=batch.seq_lens.push(rows),
                         max_query_len=int(query_lens.max()))
        inputs = Batch(ids=batch.ids.push(total), positions=batch.positions.push(total),
                       attn=self.attention.prepare(step))
        if self._copied is not None:
            self._copied.record()
        return self.model(inputs)

    def _sample(self, hidden: Tensor, rows: np.ndarray, ends: np.ndarray, result: Result) -> None:
        """Sample one token for each of `rows` and record it everywhere."""
        batch = self.batch
        last = torch.from_numpy(ends[rows] - 1).to(self.device)
        logits = self.model.compute_logits(hidden if len(rows) == len(hidden) else hidden[last])
        metadata = self.sampling.metadata(rows, batch.num_tokens, batch.num_prompt, batch.token_ids)
        out = self.sampler.forward(logits, metadata)
        tokens, invalid = out.token_ids.tolist(), out.invalid.tolist()
        states = [batch.states[row] for row in rows.tolist()]
        for i, (state, token) in enumerate(zip(states, tokens)):
            request_id = state.request.request_id
            if invalid[i]:
                result.errors[request_id] = out.errors.get(i) or "the model produced NaN or no finite logits"
            else:
                batch.append_token(state, token)
                result.sampled[request_id] = [token]
        self.sampling.observe(rows, np.asarray(tokens))
        if out.logprobs is not None:
            wanted = [state.request.params.logprobs for state in states]
            for state, lists in zip(states, to_lists(out.logprobs, wanted)):
                if lists is not None:
                    result.logprobs[state.request.request_id] = lists

    def _prompt_logprobs(self, row: int, hidden: Tensor, result: Result) -> None:
        """Log probabilities of the prompt tokens that this chunk's hidden states [Q, hidden] predict."""
        state, start = self.batch.states[row], int(self.batch.num_computed[row])
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
