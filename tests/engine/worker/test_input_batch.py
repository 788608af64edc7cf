"""The persistent batch against one rebuilt from scratch every step."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.plan import NewRequest
from nybble.engine.request import SamplingParams
from nybble.engine.worker.input_batch import CachedRequestState, InputBatch
from nybble.engine.worker.step_buffers import StepBuffers

BLOCK, ROWS, LENGTH = 4, 5, 40


def new_state(name: int, tokens: list[int], first_block: int) -> CachedRequestState:
    blocks = list(range(first_block, first_block + -(-len(tokens) // BLOCK)))
    return CachedRequestState.start(NewRequest(
        request_id=str(name), token_ids=tokens, num_prompt_tokens=len(tokens), num_computed_tokens=0,
        block_ids=(blocks,), params=SamplingParams(), seed=0, stop_token_ids=[], bad_words_token_ids=[]))


def expected(state: CachedRequestState, computed: int, count: int):
    """ids, positions and slots of one request's next `count` tokens, the slow way."""
    positions = list(range(computed, computed + count))
    slots = [state.block_ids[0][p // BLOCK] * BLOCK + p % BLOCK for p in positions]
    return [state.token_ids[p] for p in positions], positions, slots


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_batch_follows_every_change(data):
    batch = InputBatch(max_rows=ROWS, max_len=LENGTH, max_tokens=ROWS * LENGTH, block_size=BLOCK,
                       device=torch.device("cpu"))
    buffers = StepBuffers(max_tokens=ROWS * LENGTH, max_rows=ROWS, device=torch.device("cpu"))
    live: list[CachedRequestState] = []
    next_block, names = 1, 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        for state in [s for s in live if data.draw(st.booleans(), "drop")]:
            hole, last = batch.remove(state)
            assert hole <= last and state.row is None
            live.remove(state)
        while len(live) < ROWS and data.draw(st.booleans(), "add"):
            tokens = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20), "tokens")
            state = new_state(names, tokens, next_block)
            names, next_block = names + 1, next_block + 10
            batch.add(state)
            live.append(state)
        for state in live:
            if len(state.token_ids) < LENGTH and data.draw(st.booleans(), "sample"):
                if len(state.token_ids) == len(state.block_ids[0]) * BLOCK:
                    batch.append_blocks(state, ([next_block],))
                    next_block += 1
                batch.expect_tokens(np.array([state.row]))
                assert batch.token_ids[state.row, len(state.token_ids)] == -1
                batch.append_token(state, data.draw(st.integers(0, 99), "token"))
        if not live:
            continue
        want = {}
        for state in live:
            computed = data.draw(st.integers(0, len(state.token_ids) - 1), "computed")
            count = data.draw(st.integers(1, len(state.token_ids) - computed), "count")
            batch.num_computed[state.row], batch.num_scheduled[state.row] = computed, count
            want[state.row] = expected(state, computed, count)
        rows, counts = batch.num_rows, batch.num_scheduled[: batch.num_rows]
        assert sorted(want) == list(range(len(live))) == list(range(rows))
        padding = data.draw(st.integers(0, ROWS - rows), "padding") if (counts == 1).all() else 0
        total = int(counts.sum())
        sampling = np.flatnonzero(batch.num_computed[:rows] + counts == batch.num_tokens[:rows])
        inputs = buffers.lay_out(total + padding, rows + padding)
        batch.fill(inputs, sampling)
        buffers.push(inputs)
        ends = np.cumsum(counts)
        assert inputs.query_start.device.tolist() == [0, *ends, *range(total + 1, total + padding + 1)]
        assert inputs.seq_lens.device.tolist() == [*(batch.num_computed[:rows] + counts), *[0] * padding]
        assert inputs.last.device[: len(sampling)].tolist() == (ends[sampling] - 1).tolist()
        for column, name in enumerate(("ids", "positions", "slots")):
            flat = [value for row in range(rows) for value in want[row][column]]
            assert getattr(inputs, name).device.tolist() == flat + [0] * padding, name
        again = buffers.lay_out(total + padding, rows + padding)
        assert [m.device.data_ptr() for m in again[:-1]] == [m.device.data_ptr() for m in inputs[:-1]]
        batch.block_table.push()
        for state in live:
            row, held = state.row, state.block_ids[0]
            assert batch.block_table.device[row, : len(held)].tolist() == held
            assert batch.token_ids[row, : batch.num_tokens[row]].tolist() == state.token_ids
