"""Logits processors: what the built-ins ban, and that a plugin's failure ends only the requests at fault."""

import numpy as np
import pytest
import torch

from nybble.engine.request import SamplingParams
from nybble.engine.sample import LogitsProcessor
from nybble.engine.sample.processors import BadWords, LogitBias, MinTokens, RowView, builtin_processors
from nybble.plugins.errors import RequestError

CPU = torch.device("cpu")
NEG_INF = float("-inf")


def banned_after(batch_type, row, vocab=8):
    """Tokens that the row cannot sample: those that still have no probability after its edits."""
    tokens = set()
    for token in range(vocab):
        logits = torch.full((1, vocab), 0.0)
        logits[0, token] = 50.0
        if batch_type(vocab, [row]).sample(logits).token_ids.item() != token:
            tokens.add(token)
    return tokens


@pytest.mark.parametrize("words, outputs, banned", [
    ([[3]], [], {3}),
    ([[3], [5]], [3], {3, 5}),
    ([[2, 3]], [], set()),
    ([[2, 3]], [2], {3}),
    ([[2, 3]], [3, 2, 2], {3}),
    ([[2, 3]], [2, 3], set()),
    ([[1, 2, 3]], [2], set()),
    ([[1, 2, 3], [2, 4]], [1, 2], {3, 4}),
    ([[1, 1, 1]], [1, 1], {1}),
    ([[99], [-1], []], [], set()),
    ([[1, 2]], [], set()),  # the prompt ends with 1, and does not count
])
def test_bad_words(batch_type, row_type, words, outputs, banned):
    row = row_type(params=SamplingParams(temperature=0, bad_words=["?"]), prompt=[0, 1], outputs=outputs,
                   bad_words=words)
    assert banned_after(batch_type, row) == banned


@pytest.mark.parametrize("params, outputs, banned", [
    ({"min_tokens": 2}, [], {2, 5}),
    ({"min_tokens": 2}, [0], {2, 5}),
    ({"min_tokens": 2}, [0, 0], set()),
    ({}, [], set()),
    ({"allowed_token_ids": [1, 2, 3, 99, -1]}, [], {0, 4, 5, 6, 7}),
    ({"allowed_token_ids": [1, 2, 3], "min_tokens": 1}, [], {0, 2, 4, 5, 6, 7}),
    ({"logit_bias": {4: -100.0, 99: 100.0, -1: 100.0}}, [], {4}),
    ({"logit_bias": {2: 100.0}, "min_tokens": 1}, [], {2, 5}),
])
def test_masks(batch_type, row_type, params, outputs, banned):
    row = row_type(params=SamplingParams(temperature=0, **params), outputs=outputs, stops=[2, 5, 99, -1])
    assert banned_after(batch_type, row) == banned


def test_builtins_write_to_no_neighbour():
    """An id of -1 or V is another row's logit when an index is computed without a check."""
    params = SamplingParams(min_tokens=1, logit_bias={-1: 5.0, 8: 5.0, 100: 5.0}, bad_words=["?"])
    none = np.empty(0, np.int32)
    view = RowView(params=params, prompt_ids=none, output_ids=none, stop_token_ids=[-1, 8, 100],
                   bad_words_token_ids=[[-1], [8]], memo={})
    for kind in (BadWords, MinTokens, LogitBias):
        logits = torch.zeros(3, 8)
        assert torch.equal(kind(8, CPU).apply(logits.clone(), [view] * 3), logits)


def test_builtins_follow_the_protocol():
    assert all(isinstance(p, LogitsProcessor) for p in builtin_processors(8, CPU))


class Plugin:
    """Forces the token that `extra_args` names, then the one after it, and so on; fails as told."""

    def __init__(self, vocab_size, device):
        self.seen = []

    def needs(self, params):
        if "force" not in (params.extra_args or {}):
            return False
        if params.extra_args["force"] == "refuse":
            raise RequestError("force must be a token", param="extra_args")
        return True

    def apply(self, logits, rows):
        self.seen.append([(row.prompt_ids.tolist(), row.output_ids.tolist()) for row in rows])
        for i, row in enumerate(rows):
            force = row.params.extra_args["force"]
            first = row.memo.setdefault("first", len(row.output_ids))
            logits[i] = NEG_INF
            if force == "raise":
                raise ZeroDivisionError("on purpose")
            if force == "shape":
                return logits[:, :1]
            if force == "dtype":
                return logits.double()
            if force != "nothing":
                logits[i, force + len(row.output_ids) - first] = 0.0
        return logits


def forced(row_type, force, **params):
    extra = None if force is None else {"force": force}
    return row_type(params=SamplingParams(extra_args=extra, **params), prompt=[1, 2], outputs=[3])


def test_a_plugin_sees_its_rows_only(batch_type, row_type):
    plugin = Plugin(8, CPU)
    batch = batch_type(8, [forced(row_type, f) for f in (None, 4, None, 6)], processors=[plugin])
    for step in range(2):  # the memo outlives a step
        output = batch.sample(torch.zeros(4, 8))
        assert output.token_ids[[1, 3]].tolist() == [4 + step, 6 + step]
        assert output.errors == {} and not output.invalid.any()
        batch.grow(range(4), output.token_ids.tolist())
    assert plugin.seen == [[([1, 2], [3])] * 2, [([1, 2], [3, 4]), ([1, 2], [3, 6])]]
    batch.put(1, forced(row_type, 4))  # a resumed request starts with an empty memo
    assert batch.sample(torch.zeros(4, 8)).token_ids[1] == 4


@pytest.mark.parametrize("fault, text", [
    ("raise", "Plugin failed: ZeroDivisionError: on purpose"),
    ("shape", "Plugin failed: TypeError: apply returned torch.float32 [1, 1], not torch.float32 [1, 8]"),
    ("dtype", "Plugin failed: TypeError: apply returned torch.float64"),
    ("refuse", "Plugin failed: RequestError: force must be a token"),
])
@pytest.mark.parametrize("others", [[], [None, None], [5, None, 2]])
def test_a_failing_row_ends_alone(batch_type, row_type, fault, text, others):
    rows = [forced(row_type, f) for f in others]
    rows.insert(1, forced(row_type, fault, presence_penalty=1.0))
    at = min(1, len(others))
    logits = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(0))
    output = batch_type(8, rows, processors=[Plugin(8, CPU)]).sample(logits)
    assert list(output.errors) == [at] and text in output.errors[at]
    assert output.invalid.tolist() == [i == at for i in range(len(rows))]
    assert output.token_ids[at] == 0
    without = [i for i in range(len(rows)) if i != at]
    if without:
        want = batch_type(8, [rows[i] for i in without], processors=[Plugin(8, CPU)]).sample(logits[without])
        assert output.token_ids[without].tolist() == want.token_ids.tolist()


def test_a_plugin_that_leaves_nothing_is_an_unusable_row_not_an_error(batch_type, row_type):
    rows = [forced(row_type, "nothing"), forced(row_type, 3)]
    output = batch_type(8, rows, processors=[Plugin(8, CPU)]).sample(torch.zeros(2, 8))
    assert output.invalid.tolist() == [True, False] and output.errors == {}
