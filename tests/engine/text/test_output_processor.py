"""Whatever steps the core takes, users get the same text, the right end, and every token once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.request import (
    CompletionOutput,
    EngineCoreOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokenLogprobLists,
)
from nybble.engine.text.detokenizer import Detokenizer
from nybble.engine.text.input_processor import InputProcessor
from nybble.engine.text.output_processor import OutputProcessor, merge_deltas
from nybble.engine.text.tokenizer import Tokenizer
from nybble.plugins.errors import RequestError

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
EOS = 2


class Rig:
    """An OutputProcessor with requests in it, and a core that says what the test tells it to."""

    def __init__(self, engine_config, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.inputs = InputProcessor(engine_config(tokenizer, max_logprobs=-1, max_model_len=4096), tokenizer)
        self.processor = OutputProcessor(tokenizer)
        self.aborted: list[str] = []

    def add(self, name: str = "r", prompt: str | list[int] = "the", **params) -> list[str]:
        params = {"max_tokens": 1000, **params}
        processed = self.inputs.process(name, prompt, SamplingParams(**params), arrival_time=1.0)
        return [core.request_id for core in self.processor.add_request(processed)]

    def step(self, core_id: str, ids: Sequence[int] = (), *, now=5.0, **fields) -> list[RequestOutput]:
        output = EngineCoreOutput(request_id=core_id, new_token_ids=list(ids), **fields)
        processed = self.processor.process([output], now)
        self.aborted += processed.abort_ids
        return processed.request_outputs

    def run(self, core_id: str, steps: Sequence[Sequence[int]]) -> list[RequestOutput]:
        """All steps, the last at the length limit, unless a stop string ends the request before."""
        outputs: list[RequestOutput] = []
        for i, ids in enumerate(steps):
            outputs += self.step(core_id, ids, finish_reason="length" if i == len(steps) - 1 else None)
            if core_id in self.aborted:
                break
        return outputs


@pytest.fixture(scope="session")
def make_rig(engine_config, byte_level: Tokenizer):
    return lambda tokenizer=byte_level: Rig(engine_config, tokenizer)


def total(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    """What a reader has who came only at the end."""
    return functools.reduce(merge_deltas, outputs).outputs


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    steps, at = [], 0
    for size in [*sizes, len(ids)]:
        if at < len(ids):
            steps.append(ids[at:at + size])
            at += size
    return steps or [[]]


TEXTS = st.text(st.sampled_from("ab 中é😀\n"), max_size=25)
STOPS = st.lists(st.text(st.sampled_from("ab 中\n"), min_size=1, max_size=4), max_size=3)
SIZES = st.lists(st.integers(1, 4), max_size=40)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, sizes=SIZES, stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 6))
def test_all_kinds_tell_the_same(
    make_rig, byte_level: Tokenizer, text: str, sizes: list[int], stops: list[str], include: bool,
    min_tokens: int,
) -> None:
    ids = byte_level.encode(text)
    params = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    results = []
    for kind in RequestOutputKind:
        rig = make_rig()
        (core_id,) = rig.add(output_kind=kind, **params)
        outputs = rig.run(core_id, cut(ids, sizes))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert not rig.processor.has_unfinished()
        results += total(outputs)
        if kind == CUMULATIVE:
            texts = [output.outputs[0].text for output in outputs]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert results[0] == results[1] == results[2]
    final = results[0]
    exempt = len(Detokenizer(byte_level).push(ids[:min_tokens]))
    matches = sorted(
        (start + len(stop), stops.index(stop), start) for stop in stops
        if (start := text.find(stop, max(0, exempt - len(stop) + 1))) >= 0 and len(ids) > min_tokens)
    if matches:
        end, which, start = matches[0]
        assert (final.text, final.finish_reason) == (text[:end if include else start], "stop")
        assert (final.stop_reason, final.token_ids) == (stops[which], ids[:len(final.token_ids)])
    else:
        assert (final.text, final.finish_reason, final.stop_reason) == (text, "length", None)
        assert final.token_ids == ids


def test_stop_string_over_three_tokens_is_never_shown(make_rig, byte_level: Tokenizer) -> None:
    rig = make_rig()
    (core_id,) = rig.add(output_kind=DELTA, stop=["END"])
    texts = []
    for char in "abENxENDzz":
        for output in rig.step(core_id, byte_level.encode(char)):
            texts.append(output.outputs[0].text)
            assert len(output.outputs[0].token_ids) == 1, "tokens are told of though their text is held back"
    assert texts == ["", "", "a", "b", "E", "N", "x", ""]
    assert rig.aborted == [core_id]
    assert rig.step(core_id, [5]) == [], "late news of an ended request"


@pytest.mark.parametrize(("params", "end", "stop_reason", "expected"), [
    ({}, EOS, None, "the cat"),
    ({"skip_special_tokens": False}, EOS, None, "the cat"),
    ({"skip_special_tokens": False, "include_stop_str_in_output": True}, EOS, None, "the cat</s>"),
    ({"include_stop_str_in_output": True}, EOS, None, "the cat"),
    ({"stop_token_ids": [70]}, 70, 70, "the cat"),
    ({"stop_token_ids": [70], "include_stop_str_in_output": True}, 70, 70, "the cat{70}"),
    ({"stop_token_ids": [70], "ignore_eos": True}, 70, 70, "the cat"),
])
@pytest.mark.parametrize("at_once", [True, False])
def test_the_token_that_ends_a_text_is_no_part_of_it(
    make_rig, byte_level: Tokenizer, params, end: int, stop_reason: int | None, expected: str, at_once: bool
) -> None:
    rig, ids = make_rig(), [*byte_level.encode("the cat"), end]
    (core_id,) = rig.add(output_kind=DELTA, **params)
    outputs = [] if at_once else rig.step(core_id, ids[:-1])
    outputs += rig.step(core_id, ids if at_once else ids[-1:], finish_reason="stop", stop_reason=stop_reason)
    (final,) = total(outputs)
    assert final.text == expected.replace("{70}", byte_level.decode([70]))
    assert (final.token_ids, final.finish_reason, final.stop_reason) == (ids, "stop", stop_reason)
    assert rig.aborted == []


def test_min_tokens_counts_the_token_that_ends_the_text(make_rig, byte_level: Tokenizer) -> None:
    """The stop string is complete with the last token that is exempt, so it is none."""
    a, b, unfinished = byte_level.encode("ab") + byte_level.encode("🜁")[:1]
    for ids, reason, text in (([a, b, EOS], "stop", "ab"), ([a, unfinished], "length", "a\ufffd")):
        rig = make_rig()
        (core_id,) = rig.add(stop=["b", "\ufffd"], min_tokens=2)
        (output,) = rig.step(core_id, ids, finish_reason=reason)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, None)


@pytest.mark.parametrize("tokenized", [True, False])
def test_without_detokenizing_there_is_no_text(make_rig, byte_level: Tokenizer, tokenized: bool) -> None:
    rig = make_rig(byte_level if tokenized else None)
    (core_id,) = rig.add(prompt=[5], detokenize=not tokenized, logprobs=1)
    rows = TokenLogprobLists([[7, 7, 8]], [[-1.0, -1.0, -2.0]], [1])
    (output,) = rig.step(core_id, [7], finish_reason="length", logprobs=rows)
    final = output.outputs[0]
    assert (output.prompt, final.text, final.token_ids) == (None, "", [7])
    assert (final.logprobs[0][7].decoded_token is None) == (not tokenized)


def test_logprobs(make_rig, byte_level: Tokenizer) -> None:
    """The sampled token first and once, then as many as were asked for, however many the batch computed."""
    rig = make_rig()
    (core_id,) = rig.add(output_kind=DELTA, logprobs=2)
    likeliest, values = [6, 7, 8], [-1.0, -2.0, -3.0]
    rows = TokenLogprobLists([[9, *likeliest], [6, *likeliest]], [[-5.0, *values], [-1.0, *values]], [40, 1])
    first = rig.step(core_id, [9, 6], logprobs=rows)[0].outputs[0]
    assert [list(entry) for entry in first.logprobs] == [[9, 6, 7], [6, 7]]
    assert [[lp.rank for lp in entry.values()] for entry in first.logprobs] == [[40, 1, 2], [1, 2]]
    assert first.logprobs[0][9].logprob == -5.0 and first.cumulative_logprob == -6.0
    assert first.logprobs[0][9].decoded_token == byte_level.token_text(9)
    rows = TokenLogprobLists([[7, 8]], [[-2.0, -3.0]], [2])
    second = rig.step(core_id, [7], logprobs=rows, finish_reason="length")[0].outputs[0]
    assert len(second.logprobs) == 1 and second.cumulative_logprob == -8.0


@pytest.mark.parametrize(("asked", "width"), [(0, 1), (1, 2), (-1, 4)])
def test_prompt_logprobs_come_once_and_whole(make_rig, asked: int, width: int) -> None:
    """The first token has none; chunks are joined; a reader of deltas gets them with the first output."""
    rows = TokenLogprobLists([[6, 9, 8, 7]], [[-4.0, -1.0, -2.0, -3.0]], [77])
    for kind in (DELTA, CUMULATIVE):
        rig = make_rig()
        (core_id,) = rig.add(prompt=[5, 6, 6], prompt_logprobs=asked, output_kind=kind)
        assert rig.step(core_id, prompt_logprobs=rows) == []
        (first,) = rig.step(core_id, [7], prompt_logprobs=rows)
        (second,) = rig.step(core_id, [7], finish_reason="length")
        assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == 3
        assert [len(entry) for entry in first.prompt_logprobs[1:]] == [width] * 2
        assert first.prompt_logprobs[1][6].rank == 77
        assert second.prompt_logprobs == (None if kind == DELTA else first.prompt_logprobs)
        assert merge_deltas(first, second).prompt_logprobs == first.prompt_logprobs


def test_several_completions(make_rig, byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a")
    for kind in RequestOutputKind:
        rig = make_rig()
        a, b, c = rig.add(n=3, output_kind=kind, stop=["aa"])
        assert rig.processor.num_unfinished == 1
        outputs = rig.step(c, ids) + rig.step(b, ids, finish_reason="length") + rig.step(a, ids)
        outputs += rig.step(c, ids) + rig.step(a, [*ids, EOS], finish_reason="stop")
        assert rig.aborted == [c] and not rig.processor.has_unfinished()
        assert [output.finished for output in outputs][-1] and not any(o.finished for o in outputs[:-1])
        if kind == FINAL_ONLY:
            assert len(outputs) == 1
        else:
            assert [[c.index for c in output.outputs] for output in outputs] == [[2], [1], [0], [2], [0]]
        assert [(c.index, c.text, c.finish_reason, c.stop_reason) for c in total(outputs)] == [
            (0, "", "stop", "aa"), (1, "a", "length", None), (2, "", "stop", "aa")]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_abort(make_rig, byte_level: Tokenizer, kind: RequestOutputKind) -> None:
    """Held back text comes with the last output; ended completions keep their end; twice is once."""
    rig, ids = make_rig(), byte_level.encode("ab") + byte_level.encode("🜁")[:1]
    a, b = rig.add(n=2, output_kind=kind, stop=["bcd"])
    rig.add("other")
    outputs = rig.step(a, ids) + rig.step(b, ids, finish_reason="length")
    last, core_ids = rig.processor.abort(["r", "nobody"])
    assert core_ids == [a] and [output.finished for output in last] == [True]
    assert [(c.text, c.finish_reason, c.token_ids) for c in total(outputs + last)] == [
        ("ab\ufffd", "abort", ids), ("ab\ufffd", "length", ids)]
    assert rig.processor.abort(["r"]) == ([], []) and rig.step(a, ids) == []
    assert rig.processor.num_unfinished == 1


def test_engine_death_and_errors_of_one_request(make_rig) -> None:
    rig = make_rig()
    (one,) = rig.add("one")
    rig.add("two", n=2, output_kind=FINAL_ONLY)
    (failed,) = rig.step(one, finish_reason="error", error="logits are not numbers")
    assert (failed.finished, failed.outputs[0].error) == (True, "logits are not numbers")
    (last,) = rig.processor.fail_all("the engine is gone")
    assert [(c.index, c.finish_reason, c.error) for c in last.outputs] == [
        (0, "error", "the engine is gone"), (1, "error", "the engine is gone")]
    assert not rig.processor.has_unfinished() and rig.processor.fail_all("again") == []


def test_a_refusal_ends_the_whole_request_and_no_other(make_rig) -> None:
    rig = make_rig()
    rig.add("1_r")
    a, b = rig.add("r", n=2)
    (output,) = rig.step(a, finish_reason="error", error="full", error_code="engine_overloaded")
    assert output.finished and {c.error_code for c in output.outputs} == {"engine_overloaded"}
    assert rig.aborted == [b] and rig.step(b, [7]) == [] and rig.processor.num_unfinished == 1


def test_an_id_in_use_is_refused_and_an_old_one_is_another_request(make_rig) -> None:
    rig = make_rig()
    (old,) = rig.add("r")
    with pytest.raises(RequestError, match="in use"):
        rig.add("r", n=2)
    rig.processor.abort(["r"])
    (new,) = rig.add("r")
    assert new != old and rig.step(old, [7]) == [] and rig.step(new, [7])[0].request_id == "r"


def test_metrics(make_rig) -> None:
    rig = make_rig()
    a, b = rig.add(n=2, output_kind=CUMULATIVE)
    rig.step(a, now=2.0, first_scheduled_time=1.5, num_cached_tokens=3)
    rig.step(b, [7], now=3.0, first_scheduled_time=1.7, num_cached_tokens=9, num_preemptions=1)
    rig.step(b, [7], now=4.0, num_preemptions=2, finish_reason="length")
    (output,) = rig.step(a, [7], now=6.0, num_preemptions=1, finish_reason="length")
    metrics = output.metrics
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (1.0, 1.5, 3.0)
    assert (metrics.finished_time, metrics.num_preemptions, output.num_cached_tokens) == (6.0, 3, 3)


def test_outputs_are_not_changed_by_later_steps(make_rig) -> None:
    rig = make_rig()
    (core_id,) = rig.add(logprobs=0)
    rows = TokenLogprobLists([[7]], [[-1.0]], [1])
    (first,) = rig.step(core_id, [7], logprobs=rows)
    rig.step(core_id, [7], logprobs=rows)
    assert (first.outputs[0].token_ids, len(first.outputs[0].logprobs)) == ([7], 1)
