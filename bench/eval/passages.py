"""The token ids that both checkpoints read: questions with their right answers, and windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from ...engine.text.tokenizer import Tokenizer
from ...plugins.errors import UsageError
from .questions import Question

TEXT = "text"
BYTES_PER_TOKEN = 32  # read of a text for every token that is wanted: more than any tokenizer needs


class Passage(NamedTuple):
    """A sequence of tokens; those from `first` on are predicted and scored."""

    task: str
    ids: list[int]
    first: int


class Encoded(NamedTuple):
    """A question as the engine gets it, and its answer as it should come."""

    question: Question
    prompt: list[int]
    answer: list[int]


def encode(questions: Sequence[Question], tokenizer: Tokenizer, max_len: int) -> list[Encoded]:
    """The questions that this tokenizer can put and whose prompt and answer fit `max_len` tokens."""
    encoded = []
    for question in questions:
        if question.messages is None:
            prompt = tokenizer.encode(question.prompt)
        elif tokenizer.has_chat_template:
            prompt = tokenizer.apply_chat_template(question.messages)
        else:
            continue
        answer = tokenizer.encode(question.answer, add_special_tokens=False)
        if prompt and len(prompt) + len(answer) < max_len:
            encoded.append(Encoded(question, prompt, answer))
    return encoded


def of_questions(encoded: Sequence[Encoded], max_tokens: int) -> list[Passage]:
    """Prompts with their right answers, of which the answers are scored; of each task as many as of the others."""
    tasks: dict[str, list[Passage]] = {}
    for one in encoded:
        passage = Passage(one.question.task, one.prompt + one.answer, len(one.prompt))
        tasks.setdefault(passage.task, []).append(passage)
    chosen: list[Passage] = []
    total = 0
    for passage in (p for row in zip_longest(*tasks.values()) for p in row if p is not None):
        if total + len(passage.ids) <= max_tokens and len(passage.ids) > passage.first:
            chosen.append(passage)
            total += len(passage.ids)
    return chosen


def of_text(path: Path, tokenizer: Tokenizer, window: int, max_tokens: int) -> list[Passage]:
    """The first `max_tokens` tokens of a file in windows; all but the first of a window are scored.

    Raises UsageError for a file that cannot be read or has not two tokens.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_tokens * BYTES_PER_TOKEN).decode("utf-8", errors="ignore")
    except OSError as error:
        raise UsageError(f"--text: cannot read {path}", found=error) from error
    ids = tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    cut = [ids[start : start + window] for start in range(0, len(ids), window)]
    passages = [Passage(TEXT, piece, 1) for piece in cut if len(piece) > 1]
    if not passages:
        raise UsageError(f"--text: {path} holds no text to read", found=f"{len(ids)} token(s)")
    return passages
