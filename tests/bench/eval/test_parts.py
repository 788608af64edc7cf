"""The parts of an evaluation that need no model: decibels, divergences, outliers, questions, passages, limits."""

from __future__ import annotations

import json
import math
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.bench.eval import outliers
from nybble.bench.eval.answers import KEPT, score
from nybble.bench.eval.divergence import EDGES, Divergences
from nybble.bench.eval.passages import Encoded, Passage, encode, of_questions, of_text
from nybble.bench.eval.questions import BOTH, Question, demo_questions, read_questions
from nybble.bench.eval.report import MatrixSqnr, Score, TaskScore, limits_exceeded, totals
from nybble.bench.eval.sqnr import Sqnr, sqnr
from nybble.engine.text.tokenizer import Tokenizer
from nybble.plugins.errors import UsageError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("true", "found", "level"), [
    ([[3.0, 4.0]], [[3.0, 4.5]], 20.0), ([[3.0, 4.0]], [[0.0, 0.0]], 0.0), ([[1.0]], [[1.0]], INF),
    ([[0.0]], [[0.0]], INF), ([[0.0]], [[1.0]], -INF), ([[1.0]], [[NAN]], -INF), ([[1.0]], [[INF]], -INF),
    ([[1.0]], [[11.0]], -20.0),
])
def test_sqnr(true, found, level):
    made = sqnr(torch.tensor(true), torch.tensor(found))
    assert made.level == pytest.approx(level)
    assert (made.exact, made.broken) == (level == INF, level == -INF)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_divergences_are_torchs(count, seed):
    rng = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(count, 11, generator=rng) * 4 for _ in range(2))
    targets = torch.randint(0, 11, (count,), generator=rng)
    found = Divergences(["x"] * count)
    for some in torch.arange(count).split(7):
        found.add(p[some], q[some], targets[some])
    (row,) = found.rows()
    logs = [logits.double().log_softmax(-1) for logits in (p, q)]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    assert (row.kl_mean, row.kl_max) == (pytest.approx(float(kl.mean())), pytest.approx(float(kl.max())))
    assert row.nll_model == pytest.approx(float(torch.nn.functional.nll_loss(logs[1], targets)))
    assert row.kl_p50 <= row.kl_p99 <= row.kl_max and sum(found.histogram().counts) == count


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_broken_model_does_not_look_perfect(bad):
    found = Divergences(["x"])
    found.add(torch.zeros(1, 3), torch.tensor([[0.0, bad, 0.0]]), torch.tensor([0]))
    assert found.rows()[0].kl_mean > 1e30 and found.histogram().counts[-1] == 1


def test_histogram_bins():
    found = Divergences([])
    values = [0.0, 10.0 ** EDGES[0] * 2, 0.05, 5.0]
    found._columns.append(torch.tensor([values] + [[0.0] * 4] * 3, dtype=torch.float64))
    counts = found.histogram().counts
    assert (counts[0], counts[EDGES.index(-2.0)], counts[EDGES.index(0.0)], sum(counts)) == (2, 1, 1, 4)


def matrices(*levels: float | None, kind: str = "experts.{}.w2", stored: str = "int4") -> list[MatrixSqnr]:
    return [MatrixSqnr(name=f"model.layers.1.mlp.{kind.format(i)}", layer=1, expert=i, stored=stored,
                       sqnr=Sqnr(signal=1.0, noise=0.0 if level is None else 1.0, db=level))
            for i, level in enumerate(levels)]


@pytest.mark.parametrize(("levels", "named"), [
    ((21.0, 21.5, 20.8, 21.2, 21.1, 3.1), ["layer 1 expert 5 w2: 3.1 dB, others 21.1 dB median (weights)"]),
    ((3.1, 21.0, 21.0, 21.0), ["layer 1 expert 0 w2: 3.1 dB, others 21.0 dB median (weights)"]),
    ((None, None, None, 12.0), ["layer 1 expert 3 w2: 12.0 dB, others inf dB median (weights)"]),
    ((None, None, None, 55.0), []),  # less than a percent is nobody's fault
    ((21.0, 21.0, 21.0, 17.0), []),  # too near
    ((30.0, 20.0, 10.0, 25.0, 15.0, 5.0), []),  # nothing is usual here
    ((21.0, 21.0, 3.0), []),  # too few to say
    ((21.0, 21.0, 21.0, 2.0, 1.0, 21.0), ["layer 1 expert 4 w2: 1.0 dB, others 21.0 dB median (weights)",
                                          "layer 1 expert 3 w2: 2.0 dB, others 21.0 dB median (weights)"]),
], ids=["one", "first", "others exact", "good enough", "near", "wide", "few", "two, worst first"])
def test_outliers(levels, named):
    assert list(map(str, outliers.find([], [], matrices(*levels)))) == named


def test_outliers_among_few_of_a_kind_are_found_among_what_is_stored_alike():
    few = matrices(4.0, kind="self_attn.q_proj") + matrices(20.0, 21.0, 20.5, kind="mlp.{}.up_proj")
    assert [o.place for o in outliers.find([], [], few)] == ["layer 1 mlp.self_attn.q_proj"]
    other = matrices(4.0, kind="self_attn.q_proj", stored="int2") + few[1:]
    assert outliers.find([], [], other) == []


@settings(deadline=None)
@given(st.lists(st.floats(-50, 100), min_size=4, max_size=60))
def test_what_is_named_lies_far_below_the_median_of_all(levels):
    for outlier in outliers.find([], [], matrices(*levels)):
        assert outlier.db is not None and outlier.db < median(levels) - outliers.STEP_DB


@pytest.mark.parametrize(("name", "numbers", "place"), [
    ("model.layers.1.block_sparse_moe.experts.5.w2", (1, 5, "w2"), "layer 1 expert 5 w2"),
    ("model.layers.12.self_attn.q_proj", (12, None, "self_attn.q_proj"), "layer 12 self_attn.q_proj"),
    ("layers.3", (3, None, ""), "layer 3"), ("lm_head", (None, None, "lm_head"), "lm_head"),
    ("model.layers.0.mlp.experts.11", (0, 11, ""), "layer 0 expert 11"),
])
def test_places(name, numbers, place):
    assert outliers.numbers_of(name) == numbers and outliers.place(name) == place


def test_demo_questions():
    questions = demo_questions(3, BOTH)
    assert len({(q.task, q.split, q.asked) for q in questions}) == len(questions)
    counts = {(t, s): sum((q.task, q.split) == (t, s) for q in questions)
              for t in ("sum", "chain") for s in ("held-out", "train")}
    assert set(counts.values()) == {3}
    assert all((q.messages is None) == (q.task != "chain") for q in questions)


LINES = [{"task": "a", "prompt": "1+1=", "answer": "2"}, {"task": "a", "prompt": "1+2=", "answer": "3"},
         {"task": "b", "messages": [{"role": "user", "content": "hi"}], "answer": "ho"}]


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(map(json.dumps, LINES)))
    assert [q.asked for q in read_questions(path, 5)] == ["1+1=", "1+2=", "hi"]
    assert [q.asked for q in read_questions(path, 1)] == ["1+1=", "hi"]


@pytest.mark.parametrize(("text", "says"), [
    ("nonsense", "line 1"), ('{"task": "a", "prompt": "x"}', "answer"), ("", "no question"),
    ('{"task": "a", "answer": "x"}', "either"), ('{"task": "a", "answer": "x", "messages": []}', "either"),
    ('{"task": "a", "answer": "x", "messages": [{"role": "user"}]}', "either"),
    ('{"task": "a", "answer": "x", "prompt": "p", "messages": [{"role": "user", "content": "c"}]}', "either"),
])
def test_a_file_that_holds_no_questions(tmp_path, text, says):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UsageError, match=says):
        read_questions(tmp_path / "q.jsonl", 5)


def test_encoding_is_the_engines(reference):
    tokenizer = Tokenizer.from_folder(reference)
    questions = [Question(**line) for line in LINES]
    first, *_, last = encode(questions, tokenizer, 100)
    assert tokenizer.decode(first.prompt + first.answer) == "1+1=2"
    assert last.prompt == tokenizer.apply_chat_template(questions[2].messages or [])
    assert len(encode(questions, tokenizer, 6)) == 2  # the chat does not fit


def test_passages_are_of_all_tasks_alike_and_bounded():
    encoded = [Encoded(Question(task="ab"[i >= 6], answer="x"), [1] * 5, [2] * (i % 3)) for i in range(12)]
    chosen = of_questions(encoded, 40)
    counts = [sum(p.task == task for p in chosen) for task in "ab"]
    assert sum(len(p.ids) for p in chosen) <= 40 and abs(counts[0] - counts[1]) <= 1 and min(counts) >= 2
    assert all(p.first == 5 < len(p.ids) for p in chosen)


def test_text_in_windows(tmp_path, reference):
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    tokenizer = Tokenizer.from_folder(reference)
    found = of_text(tmp_path / "t.txt", tokenizer, 16, 50)
    assert [len(p.ids) for p in found] == [16, 16, 16, 2] and found[0] == Passage("text", found[0].ids, 1)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(UsageError, match="no text"):
        of_text(tmp_path / "t.txt", tokenizer, 16, 50)


def test_scores():
    questions = [Question(task=t, answer="yes", prompt=f"{t}{i}", split="s") for t in "ab" for i in range(9)]
    encoded = [Encoded(q, [1], [2]) for q in questions[:-1]]
    a, b = score(questions, encoded, [" yes\n"] * 9 + ["no"] * 8, ["yes"] * 17)
    assert (a.model.right, a.model.total, a.model.wrong, a.skipped) == (9, 9, [], 0)
    assert (b.model.right, b.model.total, len(b.model.wrong), b.skipped) == (0, 8, KEPT, 1)
    assert b.reference == Score(right=8, total=8, wrong=[]) and b.model.wrong[0].expected == "yes"
    model, reference = totals([a, b])["s"]
    assert (model.right, model.total, reference and reference.right) == (9, 17, 17)


@pytest.mark.parametrize(("drop", "fails"), [(0.0, True), (4.9, True), (5.1, False), (None, False)])
def test_drop_limit(drop, fails):
    def task(split: str, right: int) -> TaskScore:
        return TaskScore(task="t", split=split, skipped=0, model=Score(right=right, total=20, wrong=[]),
                         reference=Score(right=20, total=20, wrong=[]))

    failed = limits_exceeded([task("held-out", 19), task("train", 20)], None, max_kl=None, max_drop=drop)
    assert [("held-out" in line, "train" in line) for line in failed] == [(True, False)] * fails
