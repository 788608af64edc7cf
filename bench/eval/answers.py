"""Exact match: what the real engine answers, greedily, against what is right."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.args import EngineArgs
from .passages import Encoded
from .questions import Question
from .report import Score, TaskScore, Wrong

SPARE = 8  # tokens more than the right answer has: enough to see that one goes on where it should end
KEPT = 5  # wrong answers shown of each task
SHOWN = 400  # characters of each


def answer(args: EngineArgs, encoded: Sequence[Encoded]) -> list[str]:
    """The engine's greedy completion of every prompt, in order."""
    from ...engine.llm import LLM
    from ...engine.request import SamplingParams

    llm = LLM.from_engine_args(args)
    try:
        most = llm.llm_engine.config.model.max_model_len
        params = [SamplingParams(temperature=0.0, max_tokens=min(len(one.answer) + SPARE, most - len(one.prompt)))
                  for one in encoded]
        outputs = llm.generate([list(one.prompt) for one in encoded], params)
        return [output.outputs[0].text for output in outputs]
    finally:
        llm.shutdown()


def score(questions: Sequence[Question], encoded: Sequence[Encoded], model: Sequence[str],
          reference: Sequence[str] | None) -> list[TaskScore]:
    """Exact match of every task and split; spaces round an answer do not count."""
    scores = []
    for task, split in dict.fromkeys((question.task, question.split) for question in questions):
        mine = [i for i, one in enumerate(encoded) if (one.question.task, one.question.split) == (task, split)]
        asked = sum((question.task, question.split) == (task, split) for question in questions)
        right = [encoded[i].question for i in mine]
        scores.append(TaskScore(
            task=task, split=split, skipped=asked - len(mine), model=_score(right, [model[i] for i in mine]),
            reference=None if reference is None else _score(right, [reference[i] for i in mine]),
        ))
    return scores


def _score(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    wrong = [Wrong(asked=question.asked[:SHOWN], got=got[:SHOWN], expected=question.answer[:SHOWN])
             for question, got in zip(questions, answers) if got.strip() != question.answer.strip()]
    return Score(right=len(questions) - len(wrong), total=len(questions), wrong=wrong[:KEPT])
