"""What a model is asked: the demo's tasks, or a file of questions with answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...models.demo.tasks import TASKS, take
from ...plugins.errors import UsageError

DEMO, NONE = "demo", "none"
HELD_OUT, TRAIN, BOTH = "held-out", "train", "both"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt to be completed, or messages to be answered in the chat format, and the one right answer."""

    task: str
    answer: str
    prompt: str = ""
    messages: list[dict[str, str]] | None = None
    split: str = ""

    @property
    def asked(self) -> str:
        return self.prompt if self.messages is None else self.messages[-1]["content"]


def demo_questions(count: int, split: str) -> list[Question]:
    """`count` questions of every task and split."""
    splits = (HELD_OUT, TRAIN) if split == BOTH else (split,)
    return [
        Question(task=task, answer=example.answer, split=name,
                 **({"messages": example.messages} if example.chat_only else {"prompt": example.prompt}))
        for name in splits for task in TASKS for example in take(task, count, held_out=name == HELD_OUT)
    ]


def read_questions(path: Path, count: int) -> list[Question]:
    """The first `count` questions of every task of a JSON-lines file. Raises UsageError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--tasks: cannot read {path}", found=error, known=[DEMO, NONE, "a .jsonl file"]) from error
    kept: dict[str, list[Question]] = {}
    for question in _parsed(path, lines):
        kept.setdefault(question.task, []).append(question)
    if not kept:
        raise UsageError(f"--tasks: {path} holds no question")
    return [question for questions in kept.values() for question in questions[:count]]


def _parsed(path: Path, lines: list[str]) -> Iterator[Question]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = msgspec.json.decode(line, type=Question)
        except msgspec.MsgspecError as error:
            raise UsageError(f"--tasks: {path}, line {number} is no question", found=error, fix=_FORM) from error
        roles = all({"role", "content"} <= message.keys() for message in question.messages or ())
        if (question.messages is None) is not bool(question.prompt) or question.messages == [] or not roles:
            raise UsageError(f"--tasks: {path}, line {number} must have either a prompt or messages", fix=_FORM)
        yield question


_FORM = """one object a line: {"task": "sum", "prompt": "1+1=", "answer": "2"}, or with "messages": [{"role": ...}]"""
