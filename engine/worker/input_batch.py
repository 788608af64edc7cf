"""The running batch on persistent, fixed-address buffers; a step writes only what changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..plan import BlockIds, NewRequest
from .step_buffers import StepInputs


@dataclass(kw_only=True, eq=False)
class CachedRequestState:
    """What a worker remembers of a request between steps, in the batch or out of it."""

    request: NewRequest
    token_ids: list[int]
    block_ids: list[list[int]]
    row: int | None = None

    @classmethod
    def start(cls, request: NewRequest) -> CachedRequestState:
        return cls(request=request, token_ids=list(request.token_ids),
                   block_ids=[list(group) for group in request.block_ids])

    def append_blocks(self, blocks: BlockIds) -> None:
        for mine, new in zip(self.block_ids, blocks):
            mine.extend(new)


class BlockTable:
    """Block numbers by row, on both sides: `host` is written row by row, and sent when it was.

    `host`: [max_rows, max_blocks] int32, pinned on CUDA; `device`: its twin, on CPU the same memory.
    """

    def __init__(self, *, max_rows: int, max_blocks: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._pinned = torch.zeros(max_rows, max_blocks, dtype=torch.int32, pin_memory=cuda)
        self.host = self._pinned.numpy()
        self.device = torch.zeros_like(self._pinned, device=device, pin_memory=False) if cuda else self._pinned
        self._changed = 0

    def write(self, row: int, start: int, blocks: list[int]) -> None:
        if blocks:
            self.host[row, start : start + len(blocks)] = blocks
            self._changed = max(self._changed, row + 1)

    def push(self) -> None:
        """Send the rows up to the last that changed."""
        if self._changed and self.device is not self._pinned:
            self.device[: self._changed].copy_(self._pinned[: self._changed], non_blocking=True)
        self._changed = 0


class InputBatch:
    """Rows 0..num_rows-1 are the requests of this step, in no particular order; holes are closed by the last row.

    Host arrays, by row: `token_ids` [max_rows, max_len] (prompt and outputs), `num_tokens`, `num_prompt`,
    `num_computed`, `num_scheduled`; `block_table` [max_rows, max_blocks] on both sides.
    """

    def __init__(self, *, max_rows: int, max_len: int, max_tokens: int, block_size: int,
                 device: torch.device) -> None:
        self.max_rows, self.block_size = max_rows, block_size
        self.states: list[CachedRequestState] = []
        self.token_ids = np.zeros((max_rows, max_len), np.int32)
        self.num_tokens = np.zeros(max_rows, np.int32)
        self.num_prompt = np.zeros(max_rows, np.int32)
        self.num_computed = np.zeros(max_rows, np.int32)
        self.num_scheduled = np.zeros(max_rows, np.int32)
        max_blocks = (max_len + block_size - 1) // block_size
        self.block_table = BlockTable(max_rows=max_rows, max_blocks=max_blocks, device=device)
        self._arange = np.arange(max_tokens)

    @property
    def num_rows(self) -> int:
        return len(self.states)

    def add(self, state: CachedRequestState) -> int:
        """Give a request the next row and fill it."""
        row, tokens = self.num_rows, len(state.token_ids)
        assert row < self.max_rows and state.row is None
        self.states.append(state)
        state.row = row
        self.token_ids[row, :tokens] = state.token_ids
        self.num_tokens[row] = tokens
        self.num_prompt[row] = state.request.num_prompt_tokens
        self.block_table.write(row, 0, state.block_ids[0])
        return row

    def remove(self, state: CachedRequestState) -> tuple[int, int]:
        """Take a request out; the last row moves into the hole. Returns (hole, row that moved there)."""
        hole, last = state.row, self.num_rows - 1
        assert hole is not None and self.states[hole] is state
        state.row = None
        moved = self.states.pop()
        if moved is not state:
            moved.row = hole
            self.states[hole] = moved
            used = self.num_tokens[last]
            self.token_ids[hole, :used] = self.token_ids[last, :used]
            for column in (self.num_tokens, self.num_prompt, self.num_computed, self.num_scheduled):
                column[hole] = column[last]
            self.block_table.write(hole, 0, moved.block_ids[0])
        return hole, last

    def append_blocks(self, state: CachedRequestState, blocks: BlockIds) -> None:
        """A request gained blocks; its row, if it has one, follows."""
        held = len(state.block_ids[0])
        state.append_blocks(blocks)
        if state.row is not None:
            self.block_table.write(state.row, held, blocks[0])

    def expect_tokens(self, rows: np.ndarray) -> None:
        """A token is being sampled for each of `rows` [S]: until it is known, -1 - i stands for the i-th of them."""
        self.token_ids[rows, self.num_tokens[rows]] = -1 - np.arange(len(rows), dtype=np.int32)
        self.num_tokens[rows] += 1

    def append_token(self, state: CachedRequestState, token: int) -> None:
        """The token that was expected for a request, which may have left the batch since."""
        if state.row is not None:
            self.token_ids[state.row, len(state.token_ids)] = token
        state.token_ids.append(token)

    def fill(self, inputs: StepInputs, sampling: np.ndarray) -> None:
        """Write a step of `num_scheduled` tokens a row from `num_computed` on; rows `sampling` [S] reach their last.

        `inputs` laid out for more tokens and rows, one token each, is a step padded to a captured one: what is beyond
        the batch computes nothing and writes to the null block.
        """
        rows, query_lens = self.num_rows, self.num_scheduled[: self.num_rows]
        ends = np.cumsum(query_lens)
        total = int(ends[-1])
        of_row = np.repeat(np.arange(rows), query_lens)
        positions = inputs.positions.host[:total]
        np.subtract(self._arange[:total], np.repeat(ends - query_lens - self.num_computed[:rows], query_lens),
                    out=positions)
        inputs.ids.host[:total] = self.token_ids[of_row, positions]
        block, offset = np.divmod(positions, self.block_size)
        inputs.slots.host[:total] = self.block_table.host[of_row, block] * np.int64(self.block_size) + offset
        inputs.query_start.host[0] = 0
        inputs.query_start.host[1 : rows + 1] = ends
        inputs.seq_lens.host[:rows] = self.num_computed[:rows] + query_lens
        inputs.last.host[: len(sampling)] = ends[sampling] - 1
        if padding := len(inputs.seq_lens.host) - rows:
            for mirror in (inputs.ids, inputs.positions, inputs.slots):
                mirror.host[-padding:] = 0
            inputs.seq_lens.host[rows:] = 0
            inputs.query_start.host[rows + 1 :] = np.arange(total + 1, total + padding + 1)
