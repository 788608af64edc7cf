"""The running batch on persistent, fixed-address buffers; a step writes only what changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..plan import BlockIds, NewRequest


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


@dataclass(kw_only=True)
class HostBuffer:
    """A host array and its device twin of the same shape. On CPU they are one memory; on CUDA the host is pinned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    torch_device: torch.device
    host: np.ndarray = field(init=False)
    device: Tensor = field(init=False)
    _pinned: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cuda = self.torch_device.type == "cuda"
        self._pinned = torch.zeros(self.shape, dtype=self.dtype, pin_memory=cuda)
        self.host = self._pinned.numpy()
        self.device = torch.zeros(self.shape, dtype=self.dtype, device=self.torch_device) if cuda else self._pinned

    def push(self, count: int) -> Tensor:
        """Send the first `count` rows and return them on the device."""
        if self.device is not self._pinned:
            self.device[:count].copy_(self._pinned[:count], non_blocking=True)
        return self.device[:count]


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
        self.block_table = HostBuffer(shape=(max_rows, max_blocks), dtype=torch.int32, torch_device=device)
        self.ids = HostBuffer(shape=(max_tokens,), dtype=torch.int64, torch_device=device)
        self.positions = HostBuffer(shape=(max_tokens,), dtype=torch.int64, torch_device=device)
        self.slots = HostBuffer(shape=(max_tokens,), dtype=torch.int64, torch_device=device)
        self.query_start = HostBuffer(shape=(max_rows + 1,), dtype=torch.int32, torch_device=device)
        self.seq_lens = HostBuffer(shape=(max_rows,), dtype=torch.int32, torch_device=device)
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
        self._write_blocks(row, 0, state.block_ids[0])
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
            self._write_blocks(hole, 0, moved.block_ids[0])
        return hole, last

    def append_blocks(self, state: CachedRequestState, blocks: BlockIds) -> None:
        """A request gained blocks; its row, if it has one, follows."""
        held = len(state.block_ids[0])
        state.append_blocks(blocks)
        if state.row is not None:
            self._write_blocks(state.row, held, blocks[0])

    def append_token(self, state: CachedRequestState, token: int) -> None:
        """A token was sampled for a request in the batch."""
        row = state.row
        assert row is not None
        state.token_ids.append(token)
        self.token_ids[row, self.num_tokens[row]] = token
        self.num_tokens[row] += 1

    def _write_blocks(self, row: int, start: int, blocks: list[int]) -> None:
        if blocks:
            self.block_table.host[row, start : start + len(blocks)] = blocks

    def prepare(self) -> tuple[np.ndarray, np.ndarray]:
        """Fill what a step sends to the device, for `num_scheduled` tokens a row from `num_computed` on.

        Returns (query_lens [R], ends [R]): each row's new tokens and where they end in the flat batch.
        """
        rows = self.num_rows
        query_lens = self.num_scheduled[:rows]
        ends = np.cumsum(query_lens)
        total = int(ends[-1])
        of_row = np.repeat(np.arange(rows), query_lens)
        positions = self.positions.host[:total]
        np.subtract(self._arange[:total], np.repeat(ends - query_lens - self.num_computed[:rows], query_lens),
                    out=positions)
        self.ids.host[:total] = self.token_ids[of_row, positions]
        block, offset = np.divmod(positions, self.block_size)
        self.slots.host[:total] = self.block_table.host[of_row, block] * np.int64(self.block_size) + offset
        self.query_start.host[1 : rows + 1] = ends
        self.seq_lens.host[:rows] = self.num_computed[:rows] + query_lens
        return query_lens, ends
