"""SamplingState: rows that were moved, cleared and grown sample like new ones; what is rebuilt, and when."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nybble.engine.request import SamplingParams

VOCAB, MAX_ROWS = 11, 6
KINDS = [
    {}, {"temperature": 0.0}, {"top_k": 3, "min_p": 0.05}, {"top_p": 0.7, "repetition_penalty": 1.5},
    {"presence_penalty": 1.9, "temperature": 0.0}, {"frequency_penalty": 1.2, "logprobs": 2},
    {"logit_bias": {4: 3.0}}, {"min_tokens": 2}, {"allowed_token_ids": [1, 2, 8], "repetition_penalty": 1.2},
]
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=4)


def machine(batch_type, row_type):
    class Rows(RuleBasedStateMachine):
        """The model is a dictionary of requests; the state must sample as one made from it on the spot."""

        @initialize()
        def start(self):
            self.batch, self.model, self.steps = batch_type(VOCAB, max_rows=MAX_ROWS), {}, 0

        @rule(at=st.integers(0, MAX_ROWS - 1), kind=st.sampled_from(KINDS), seed=st.integers(0, 5),
              prompt=tokens, outputs=tokens)
        def put(self, at, kind, seed, prompt, outputs):
            self.model[at] = row_type(params=SamplingParams(**kind), seed=seed, prompt=[0, *prompt],
                                      outputs=outputs, stops=[2])
            self.batch.put(at, self.model[at])

        @precondition(lambda self: self.model)
        @rule(data=st.data(), dst=st.integers(0, MAX_ROWS - 1))
        def move(self, data, dst):
            src = data.draw(st.sampled_from(sorted(self.model)))
            if src != dst:
                self.batch.move(src, dst)
                self.model[dst] = self.model.pop(src)

        @precondition(lambda self: self.model)
        @rule(data=st.data())
        def clear(self, data):
            at = data.draw(st.sampled_from(sorted(self.model)))
            self.batch.state.clear_row(at)
            del self.model[at]

        @precondition(lambda self: self.model)
        @rule(data=st.data())
        def grow(self, data):
            """Some rows gain a token; a row may gain several in a step."""
            rows = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=6))
            gained = [data.draw(st.integers(0, VOCAB - 1)) for _ in rows]
            self.batch.grow(rows, gained)
            for row, token in zip(rows, gained):
                self.model[row].outputs = [*self.model[row].outputs, token]

        @invariant()
        def samples_like_new(self):
            if not self.model:
                return
            self.steps += 1
            at = sorted(self.model, key=lambda row: (row * 7 + self.steps) % MAX_ROWS)
            logits = torch.randn(len(at), VOCAB, generator=torch.Generator().manual_seed(self.steps))
            fresh = batch_type(VOCAB, [self.model[row] for row in at], max_rows=MAX_ROWS)
            got, want = self.batch.sample(logits, at), fresh.sample(logits)
            assert torch.equal(got.token_ids, want.token_ids)
            assert (got.logprobs is None) == (want.logprobs is None)
            if got.logprobs is not None:
                assert torch.equal(got.logprobs.logprobs, want.logprobs.logprobs)
            asked = tuple(self.model[row].params.logprobs for row in at)
            assert self.batch.metadata(at).num_logprobs == asked

    return Rows


def test_moved_cleared_and_grown_rows(batch_type, row_type):
    run_state_machine_as_test(machine(batch_type, row_type),
                              settings=settings(max_examples=40, stateful_step_count=20, deadline=None))


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"temperature": 0.6, "repetition_penalty": 1.3}])
def test_a_seed_gives_its_tokens_wherever_it_runs(batch_type, row_type, params):
    """Position in the batch, company, preemption (a new set_row) and skipped steps change nothing."""
    params, steps = SamplingParams(**params), 12
    logits = torch.randn(steps, VOCAB, generator=torch.Generator().manual_seed(5)) * 2

    def run(seed, at, companions, preempt_at=None):
        row = row_type(params=params, seed=seed, prompt=[1, 2])
        batch = batch_type(VOCAB, [row_type(params=SamplingParams(top_k=2), seed=50)] * companions)
        batch.put(at, row)
        for step in range(steps):
            if step == preempt_at:
                batch.put(at, row_type(params=SamplingParams()))
                batch.move(at, at + 1)
                batch.put(at, row)
            others = list(range(companions)) if step % 3 else []
            output = batch.sample(logits[step].expand(len(others) + 1, VOCAB), [*others, at])
            row.outputs.append(int(output.token_ids[-1]))
            batch.grow([at], row.outputs[-1:])
        return row.outputs

    alone = run(7, 0, 0)
    assert alone == run(7, 4, 3) == run(7, 6, 5, preempt_at=4)
    assert alone != run(8, 0, 0)


def test_tensors_are_kept_while_the_rows_stay(batch_type, row_type):
    rows = [row_type(params=SamplingParams(top_p=0.5, presence_penalty=1.0), seed=s) for s in range(4)]
    batch = batch_type(VOCAB, rows)
    first = batch.metadata([0, 1, 2])
    batch.grow([0, 1, 2], [5, 5, 5])
    second = batch.metadata([0, 1, 2])
    assert second.random is first.random and second.penalties is first.penalties
    assert not torch.equal(first.uniforms, second.uniforms)
    for change in (lambda: batch.metadata([0, 2, 1]), lambda: batch.put(3, rows[0]), lambda: batch.move(3, 5),
                   lambda: batch.state.clear_row(5)):
        before = batch.metadata([0, 1, 2])
        change()
        assert batch.metadata([0, 1, 2]).random is not before.random


def test_the_caller_may_reuse_its_arrays(batch_type, row_type):
    batch = batch_type(VOCAB, [row_type(params=SamplingParams(), seed=s) for s in range(2)])
    rows = np.array([0, 1])
    host = batch.num_tokens, batch.num_prompt, batch.token_ids
    before = batch.state.metadata(rows, *host).uniforms
    rows[:] = [1, 0]
    assert torch.equal(batch.state.metadata(rows, *host).uniforms, before.flip(0))


def test_features_nobody_uses_cost_nothing(batch_type, row_type):
    plain = batch_type(VOCAB, [row_type(params=SamplingParams(temperature=t)) for t in (0.0, 1.0)])
    metadata = plain.metadata([0])
    assert metadata == type(metadata)(num_rows=1, num_logprobs=(None,))
    random = plain.metadata([0, 1]).random
    assert random.index.tolist() == [1] and random.min_p is None and random.top is None
    off = SamplingParams(top_k=VOCAB, top_p=1.0, min_p=0.0, repetition_penalty=1.0, min_tokens=0)
    metadata = batch_type(VOCAB, [row_type(params=off)]).metadata([0])
    assert metadata.random.top is None and metadata.penalties is None and metadata.jobs == ()


def test_ids_outside_the_vocabulary_are_not_counted(batch_type, row_type):
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5)
    odd = row_type(params=params, prompt=[-1, VOCAB, 10**6], outputs=[-1, VOCAB])
    batch = batch_type(VOCAB, [row_type(params=params), odd, row_type(params=params)])
    batch.state.observe(np.array([1, 1, 1]), np.array([-1, VOCAB, 10**6]))
    logits = torch.linspace(1, 2, VOCAB).repeat(3, 1)
    assert batch.sample(logits).token_ids.tolist() == [VOCAB - 1] * 3
    batch.state.observe(np.array([1]), np.array([VOCAB - 1]))
    assert batch.sample(logits).token_ids.tolist() == [VOCAB - 1, VOCAB - 2, VOCAB - 1]
