"""What reaches the core is complete and in range; what cannot be is refused with the field's name."""

from __future__ import annotations

import logging

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from nybble.engine.request import SamplingParams
from nybble.engine.text.input_processor import InputProcessor
from nybble.engine.text.parallel_sampling import fan_out
from nybble.engine.text.tokenizer import Tokenizer
from nybble.plugins.errors import CheckpointError, RequestError

CONTEXT = 64


@pytest.fixture(scope="session")
def processor(byte_level: Tokenizer, engine_config) -> InputProcessor:
    return InputProcessor(engine_config(byte_level), byte_level)


@pytest.mark.parametrize("prompt", [
    "the cat", {"prompt": "the cat"}, {"prompt": None, "prompt_token_ids": [5, 6]}, [5, 6],
    {"prompt": "as it was", "prompt_token_ids": [5, 6]},
])
def test_forms_of_a_prompt(processor: InputProcessor, byte_level: Tokenizer, prompt) -> None:
    processed = processor.process("r", prompt, SamplingParams(), priority=0, cache_salt="s", arrival_time=2.0)
    text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None
    given_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else prompt
    core = processed.core
    assert processed.text == text
    assert core.prompt_token_ids == (given_ids if isinstance(given_ids, list) else byte_level.encode(text))
    assert (core.request_id, core.cache_salt, core.arrival_time) == ("r", "s", 2.0)


@pytest.mark.parametrize(("prompt", "params", "param", "code", "message"), [
    ("", {}, "prompt", None, "no tokens"),
    ([], {}, "prompt", None, "no tokens"),
    (5, {}, "prompt", None, "int"),
    (None, {}, "prompt", None, "NoneType"),
    ({}, {}, "prompt", None, "dict"),
    ({"prompt": "a", "image": "b"}, {}, "prompt", None, "image"),
    ({"prompt": 5}, {}, "prompt", None, "dict"),
    ({"prompt_token_ids": (1, 2)}, {}, "prompt", None, "dict"),
    ("\ud800", {}, "prompt", None, "valid Unicode"),
    ([5] * CONTEXT, {}, "prompt", "context_length_exceeded", "has 64 tokens; the model's context is 64"),
    ("x " * 40, {}, "prompt", "context_length_exceeded", "has 80 tokens"),
    ("x" * (16 * CONTEXT + 1), {}, "prompt", "context_length_exceeded", "1025 characters"),
    ([5], {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None, "-1 or at least 1"),
    ([5] * 99, {"truncate_prompt_tokens": 70}, "prompt", "context_length_exceeded", "has 70 tokens"),
    ([5], {"logprobs": 21}, "logprobs", None, "at most 20"),
    ([5], {"logprobs": -1}, "logprobs", None, "at most 20"),
    ([5], {"prompt_logprobs": 21}, "prompt_logprobs", None, "at most 20"),
    ([5], {"bad_words": ["  "]}, "bad_words", None, "at least one token"),
])
def test_refusals(
    processor: InputProcessor, prompt, params, param: str, code: str | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        processor.process("r", prompt, SamplingParams(**params))
    assert (refusal.value.param, refusal.value.code) == (param, code)


TOKEN_ID_FIELDS = {
    "prompt": lambda i: ([5, i], {}),
    "stop_token_ids": lambda i: ([5], {"stop_token_ids": [5, i]}),
    "logit_bias": lambda i: ([5], {"logit_bias": {5: 1.0, i: 1.0}}),
    "allowed_token_ids": lambda i: ([5], {"allowed_token_ids": [5, i]}),
}


@settings(deadline=None)
@given(field=st.sampled_from(sorted(TOKEN_ID_FIELDS)),
       token=st.integers() | st.sampled_from([True, 1.0, "5", None]))
def test_no_token_id_outside_the_vocabulary_gets_through(
    processor: InputProcessor, byte_level: Tokenizer, field: str, token: object
) -> None:
    prompt, params = TOKEN_ID_FIELDS[field](token)
    if type(token) is int and 0 <= token < byte_level.vocab_size + 10:
        processor.process("r", prompt, SamplingParams(**params))
        return
    with pytest.raises(RequestError, match="outside the model's vocabulary") as refusal:
        processor.process("r", prompt, SamplingParams(**params))
    assert refusal.value.param == field


def test_every_field_with_token_ids_is_known_here() -> None:
    """A new field of SamplingParams with ids in it has to be added to the check."""
    fields = {name for name in SamplingParams.__struct_fields__ if "token_id" in name or "bias" in name}
    assert fields == TOKEN_ID_FIELDS.keys() - {"prompt"}


@pytest.mark.parametrize(("truncate", "length", "kept"), [
    (None, 10, 10), (-1, 200, CONTEXT - 1), (-1, 10, 10), (4, 200, 4), (4, 2, 2),
])
def test_truncation_keeps_the_end(
    processor: InputProcessor, truncate: int | None, length: int, kept: int
) -> None:
    ids = [i % 100 for i in range(length)]
    core = processor.process("r", ids, SamplingParams(truncate_prompt_tokens=truncate)).core
    assert core.prompt_token_ids == ids[-kept:]


@pytest.mark.parametrize(("asked", "expected"), [(None, 54), (5, 5), (54, 54), (1000, 54)])
def test_max_tokens_ends_at_the_context(processor: InputProcessor, asked: int | None, expected: int) -> None:
    assert processor.process("r", [5] * 10, SamplingParams(max_tokens=asked)).core.max_tokens == expected


@pytest.mark.parametrize(("cap", "asked", "allowed"), [
    (5, 5, True), (5, 6, False), (-1, 10**6, True), (-1, -1, True), (10**6, -1, True), (0, 0, True),
    (0, 1, False),
])
def test_logprobs_cap(byte_level: Tokenizer, engine_config, cap: int, asked: int, allowed: bool) -> None:
    processor = InputProcessor(engine_config(byte_level, max_logprobs=cap), byte_level)
    for params in (SamplingParams(logprobs=asked), SamplingParams(prompt_logprobs=asked)):
        if allowed:
            assert processor.process("r", [5], params).core.params == params
        else:
            with pytest.raises(RequestError, match=f"at most {cap} here"):
                processor.process("r", [5], params)


@pytest.mark.parametrize(("generation", "hf", "expected", "warning"), [
    ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, [7, 8, 2], "ends a text with token 2"),
    ({}, {"eos_token_id": 2}, [2], None),
    ({}, {}, [2], None),
    ({"eos_token_id": [2, 9999]}, {}, [2], "not all in the vocabulary"),
])
def test_end_tokens(byte_level: Tokenizer, engine_config, caplog: pytest.LogCaptureFixture, generation, hf,
                    expected: list[int], warning: str | None) -> None:
    with caplog.at_level(logging.WARNING, logger="nybble"):
        config = engine_config(byte_level, generation_config=generation, hf_config=hf)
        processor = InputProcessor(config, byte_level)
    core = processor.process("r", [5], SamplingParams(stop_token_ids=[11, 10, 11])).core
    assert (core.eos_token_ids, core.stop_token_ids) == (expected, [11, 10])
    assert [warning in message for message in caplog.messages] == ([True] if warning else [])


def test_seeds(byte_level: Tokenizer, engine_config) -> None:
    def seeds(engine_seed: int, asked: list[int | None]) -> list[int]:
        processor = InputProcessor(engine_config(byte_level, seed=engine_seed), byte_level)
        return [processor.process("r", [5], SamplingParams(seed=seed)).core.seed for seed in asked]

    unseeded = seeds(0, [None] * 50)
    assert len(set(unseeded)) == 50 and all(0 <= seed < 1 << 64 for seed in unseeded)
    assert seeds(0, [None] * 50) == unseeded != seeds(1, [None] * 50)
    assert seeds(0, [None, 5, None, -1]) == [unseeded[0], 5, unseeded[2], (1 << 64) - 1]


def test_bad_words_with_and_without_a_space(engine_config) -> None:
    """The form behind a space counts where it is another word token, not where a space is put in front."""
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(["a", "b", "Ġ", "Ġb"])}, [("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(backend)
    core = InputProcessor(engine_config(tokenizer), tokenizer).process(
        "r", [0], SamplingParams(bad_words=["a", "b", " ba"])).core
    assert core.bad_words_token_ids == [[0], [1], [3], [1, 0], [3, 0]]


def test_defaults_come_from_generation_config(byte_level: Tokenizer, engine_config) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "top_k": None, "do_sample": True}
    processor = InputProcessor(engine_config(byte_level, generation_config=generation), byte_level)
    assert processor.default_sampling_params() == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 7}
    with pytest.raises(CheckpointError, match="out of range"):
        InputProcessor(engine_config(byte_level, generation_config={"top_p": 7}), byte_level)


def test_a_tokenizer_larger_than_the_model_is_refused(byte_level: Tokenizer, engine_config) -> None:
    InputProcessor(engine_config(byte_level, vocab_size=byte_level.max_token_id + 1), byte_level)
    with pytest.raises(CheckpointError, match="tokens that the model has not"):
        InputProcessor(engine_config(byte_level, vocab_size=byte_level.max_token_id), byte_level)


@pytest.mark.parametrize(("prompt", "params", "param"), [
    ("text", {}, "prompt"), ([5], {"stop": "x"}, "stop"), ([5], {"bad_words": ["x"]}, "bad_words"),
])
def test_without_a_tokenizer_only_ids_are_taken(engine_config, prompt, params, param: str) -> None:
    processor = InputProcessor(engine_config(None), None)
    assert processor.process("r", [5], SamplingParams()).core.prompt_token_ids == [5]
    with pytest.raises(RequestError, match="needs a tokenizer") as refusal:
        processor.process("r", prompt, SamplingParams(**params))
    assert refusal.value.param == param


def test_an_empty_text_is_refused_though_bos_would_be_put_in_front(engine_config, byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level.backend, {"bos_token": "<s>", "add_bos_token": True})
    processor = InputProcessor(engine_config(tokenizer), tokenizer)
    assert processor.process("r", "a", SamplingParams()).core.prompt_token_ids[0] == 1
    with pytest.raises(RequestError, match="no tokens"):
        processor.process("r", "", SamplingParams())


def test_priority_needs_its_policy(byte_level: Tokenizer, engine_config, processor: InputProcessor) -> None:
    with pytest.raises(RequestError, match="--scheduling-policy priority"):
        processor.process("r", [5], SamplingParams(), priority=1)
    other = InputProcessor(engine_config(byte_level, policy="priority"), byte_level)
    assert other.process("r", [5], SamplingParams(), priority=-3).core.priority == -3


def test_fan_out(processor: InputProcessor) -> None:
    one = processor.process("r", [5], SamplingParams()).core
    (only,) = fan_out(one, 7)
    assert msgspec.structs.replace(only, request_id="r") == one
    params = SamplingParams(n=3, seed=(1 << 64) - 1, prompt_logprobs=1, logprobs=2)
    core = processor.process("r", [5], params).core
    children = fan_out(core, 8)
    assert len({only.request_id, *(child.request_id for child in children)}) == 4
    assert [child.seed for child in children] == [(1 << 64) - 1, 0, 1]
    assert [child.params.prompt_logprobs for child in children] == [1, None, None]
    assert all(child.params.n == 1 and child.params.logprobs == 2 for child in children)
    assert {child.max_tokens for child in children} == {core.max_tokens}
    assert [child.eos_token_ids for child in children] == [core.eos_token_ids] * 3
