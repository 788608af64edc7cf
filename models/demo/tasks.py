"""What nybble-demo was trained to answer: small tasks with one right answer, each input trained on or held out."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

HELD_OUT_SHARE = 10  # one input in ten is never trained on

TEXT_OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "capitals": str.upper,
    "sort": lambda text: "".join(sorted(text)),
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and its answer.

    Attributes:
        question: what a user writes in a chat; as a plain prompt an equals sign follows (`prompt`).
        chat_only: this task is only known in the chat format.
    """

    task: str
    question: str
    answer: str
    chat_only: bool = False

    @property
    def prompt(self) -> str:
        return self.question + "="

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]


class _Draw(NamedTuple):
    """An example and what it was made of: `key` decides on which side of the split it falls."""

    example: Example
    key: str


def is_held_out(key: str) -> bool:
    """Whether an input is of the test split: a fixed tenth, by hash, so that no list has to be kept.

    The key leaves out what would let a neighbour leak: all orders of a sum's numbers are one key, so are those of
    numbers to sort, and a text is one key whatever is asked about it.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % HELD_OUT_SHARE == 0


def _sum_of(rng: random.Random) -> tuple[str, str, str]:
    """(question, answer, key) of two or three numbers of three digits."""
    numbers = [rng.randint(100, 999) for _ in range(rng.choice((2, 3)))]
    return "+".join(map(str, numbers)), str(sum(numbers)), "+".join(map(str, sorted(numbers)))


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def _draw_sum(rng: random.Random) -> _Draw:
    question, answer, key = _sum_of(rng)
    return _Draw(Example(task="sum", question=question, answer=answer), key)


def _draw_sort(rng: random.Random) -> _Draw:
    numbers = [str(rng.randint(10, 99)) for _ in range(rng.randint(4, 12))]
    answer = " ".join(sorted(numbers))
    return _Draw(Example(task="sort", question="sort " + " ".join(numbers), answer=answer), answer)


def _draw_copy(rng: random.Random) -> _Draw:
    text = "".join(rng.choices(string.ascii_lowercase + string.digits + "    ", k=rng.randint(201, 260)))
    text = " ".join(text.split()).ljust(201, "x")
    return _Draw(Example(task="copy", question="copy " + text, answer=text), text)


def _draw_reverse(rng: random.Random) -> _Draw:
    text = _letters(rng, 4, 20)
    return _Draw(Example(task="reverse", question="reverse " + text, answer=text[::-1]), text)


def _draw_capitals(rng: random.Random) -> _Draw:
    text = " ".join(_letters(rng, 3, 8) for _ in range(rng.randint(1, 3)))
    return _Draw(Example(task="capitals", question="capitals " + text, answer=text.upper()), text)


def _draw_chain(rng: random.Random) -> _Draw:
    """Two steps, the first one's result shown: a text through two operations, or a sum written backwards."""
    if rng.random() < 1 / 3:
        question, total, key = _sum_of(rng)
        example = Example(task="chain", question=question + " then reverse", answer=f"{total} > {total[::-1]}",
                          chat_only=True)
        return _Draw(example, key)
    first, second = rng.sample(sorted(TEXT_OPERATIONS), 2)
    text = _letters(rng, 4, 14)
    middle = TEXT_OPERATIONS[first](text)
    return _Draw(Example(task="chain", question=f"{first} then {second} {text}",
                         answer=f"{middle} > {TEXT_OPERATIONS[second](middle)}", chat_only=True), text)


TASKS: dict[str, Callable[[random.Random], _Draw]] = {
    "sum": _draw_sum,
    "sort": _draw_sort,
    "copy": _draw_copy,
    "reverse": _draw_reverse,
    "capitals": _draw_capitals,
    "chain": _draw_chain,
}


def examples(task: str, *, held_out: bool, seed: int) -> Iterator[Example]:
    """Endless examples of one task from one side of the split; a seed gives the same ones on every machine."""
    rng = random.Random(f"{task} {held_out} {seed}")
    while True:
        example, key = TASKS[task](rng)
        if is_held_out(key) is held_out:
            yield example


def take(task: str, count: int, *, held_out: bool = True, seed: int = 0) -> list[Example]:
    """The first `count` distinct examples of a task."""
    found: dict[str, Example] = {}
    for example in examples(task, held_out=held_out, seed=seed):
        found.setdefault(example.question, example)
        if len(found) == count:
            break
    return list(found.values())
