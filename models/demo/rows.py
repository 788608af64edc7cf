"""Training rows: examples packed end to end as token ids, half as plain prompts and half as conversations."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from .checkpoint import EOS, IM_END, IM_START, PAD, encode
from .tasks import TASKS, Example, examples

ROW_TOKENS = 608  # holds the longest copy in the chat format
# Shares of examples, not of tokens: one copy has the tokens of twenty sums.
SHARES = {"sum": 0.25, "sort": 0.2, "copy": 0.06, "reverse": 0.18, "capitals": 0.07, "chain": 0.24}
IGNORE = -100

Ids = npt.NDArray[np.int16]


def as_tokens(example: Example, chat: bool) -> tuple[list[int], list[int]]:
    """(ids that are given, ids to be answered): the answer with the token that ends it.

    The chat form is what `checkpoint.CHAT_TEMPLATE` writes for one user message.
    """
    if not chat:
        return encode(example.prompt), [*encode(example.answer), EOS]
    given = [IM_START, *encode("user\n" + example.question), IM_END, *encode("\n"), IM_START, *encode("assistant\n")]
    return given, [*encode(example.answer), IM_END]


def make_rows(seed: int, count: int) -> tuple[Ids, Ids]:
    """`count` rows of ids and of targets, each [count, ROW_TOKENS]; a target that is given and not answered is IGNORE.

    Row and seed alone decide what is in a row, so that a resumed run sees what an unbroken one would.
    """
    rng = random.Random(seed)
    ids = np.full((count, ROW_TOKENS + 1), PAD, np.int16)
    answered = np.zeros((count, ROW_TOKENS + 1), bool)
    streams = {task: examples(task, held_out=False, seed=rng.getrandbits(62)) for task in TASKS}
    for row in range(count):
        chat, used = rng.random() < 0.5, 0
        tasks = [task for task in TASKS if chat or task != "chain"]
        weights = [SHARES[task] for task in tasks]
        while True:
            given, answer = as_tokens(next(streams[rng.choices(tasks, weights)[0]]), chat)
            if chat:
                answer = [*answer, *encode("\n")]  # what the template puts between turns
            end = used + len(given) + len(answer)
            if end > ROW_TOKENS + 1:
                break
            ids[row, used:end] = given + answer
            answered[row, used + len(given) : end - chat] = True
            used = end
    return ids[:, :-1], np.where(answered[:, 1:], ids[:, 1:], IGNORE).astype(np.int16)
