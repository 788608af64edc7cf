"""The demo's tasks: right answers, a split that nothing crosses, rows that hold what they should."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template

from nybble.models.demo.checkpoint import CHAT_TEMPLATE, EOS, IM_END, PAD, SPECIALS, encode
from nybble.models.demo.rows import IGNORE, ROW_TOKENS, as_tokens, make_rows
from nybble.models.demo.tasks import TASKS, Example, examples, is_held_out, take

STEPS = {"reverse": lambda text: "".join(reversed(text)), "capitals": lambda text: text.upper(),
         "sort": lambda text: "".join(sorted(text))}


def right_answer(question: str) -> str:
    """Solved from the question's words alone, by other means than the generator's."""
    if chain := re.fullmatch(r"([\d+]+) then reverse", question):
        total = str(eval(chain[1]))
        return f"{total} > {total[::-1]}"
    if re.fullmatch(r"[\d+]+", question):
        return str(eval(question))
    if chain := re.fullmatch(r"(\w+) then (\w+) (\w+)", question):
        middle = STEPS[chain[1]](chain[3])
        return f"{middle} > {STEPS[chain[2]](middle)}"
    task, _, text = question.partition(" ")
    if task == "sort":
        return " ".join(sorted(text.split(), key=int))
    return text if task == "copy" else STEPS[task](text)


def key_of(question: str) -> str:
    """What decides about the split, read from the question."""
    words = question.split()
    if numbers := re.match(r"\d+(\+\d+)+", question):
        return "+".join(map(str, sorted(map(int, numbers[0].split("+")))))
    if words[0] == "sort" and words[1].isdigit():
        return " ".join(sorted(words[1:]))
    return words[-1] if "then" in words else question.partition(" ")[2]


@pytest.mark.parametrize("task", TASKS)
@given(seed=st.integers(0, 10**6), held_out=st.booleans())
def test_answers_are_right_and_stay_on_their_side(task, seed, held_out):
    for example in islice(examples(task, held_out=held_out, seed=seed), 5):
        assert (example.task, example.answer) == (task, right_answer(example.question))
        assert is_held_out(key_of(example.question)) is held_out
        assert example.chat_only is (task == "chain")


def test_a_tenth_is_held_out():
    share = np.mean([is_held_out(f"{a}+{b}") for a in range(100, 300) for b in range(300, 400)])
    assert 0.095 < share < 0.105


def test_copies_are_long_and_examples_differ():
    assert all(len(example.answer) > 200 for example in take("copy", 50))
    assert len({example.question for example in take("sum", 200)}) == 200
    assert take("sort", 20) == take("sort", 20) != take("sort", 20, seed=1)


@given(question=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])), answer=st.text(max_size=9))
def test_the_chat_form_is_the_templates(question, answer):
    given_ids, answered = as_tokens(Example(task="x", question=question, answer=answer), chat=True)
    text = Template(CHAT_TEMPLATE).render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
    written = [SPECIALS[i].encode() if i < len(SPECIALS) else bytes([i - len(SPECIALS)]) for i in given_ids]
    assert b"".join(written) == text.encode()
    assert answered == [*encode(answer), IM_END]


def test_rows_train_answers_alone_and_only_of_their_side():
    ids, targets = make_rows(3, 16)
    assert ids.shape == targets.shape == (16, ROW_TOKENS) and (ids >= 0).all()
    kept = targets != IGNORE
    assert (targets[:, :-1][kept[:, :-1]] == ids[:, 1:][kept[:, :-1]]).all() and not kept[ids == PAD].any()
    found = 0
    for row, answered in zip(ids, kept):
        text = "".join(chr(i - len(SPECIALS)) if i >= len(SPECIALS) else f"<{i}>" for i in row)
        plain = re.findall(rf"(?:^|<{EOS}>)([^<]*)=([^<]*)(?=<{EOS}>)", text)
        chat = re.findall(r"<3>user\n([^<]*)<4>\n<3>assistant\n([^<]*)<4>", text)
        for question, answer in plain + chat:
            assert answer == right_answer(question) and not is_held_out(key_of(question))
            found += 1
        assert answered.sum() >= sum(len(answer) for _, answer in plain + chat)
    assert found > 100
    again = make_rows(3, 16)
    assert (again[0] == ids).all() and (make_rows(4, 16)[0] != ids).any()


