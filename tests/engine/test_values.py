"""Setting values: suffixes, types, bounds, and how a bad one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.args import EngineArgs, setting_fields
from nybble.engine.values import Entry, merge, parse_value
from nybble.plugins.errors import UsageError

HINTS = get_type_hints(EngineArgs)


def parse(field: str, raw: Any) -> Any:
    return parse_value(setting_fields()[field], HINTS[field], raw, "--x")


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("max_model_len", "4096", 4096),
        ("max_model_len", "1k", 1000),
        ("max_model_len", "1K", 1024),
        ("max_model_len", "25.6k", 25600),
        ("max_model_len", " 0.5K ", 512),
        ("max_model_len", "2m", 2_000_000),
        ("max_model_len", 77, 77),
        ("max_model_len", "none", None),
        ("max_model_len", "", None),
        ("max_model_len", None, None),
        ("kv_cache_memory_bytes", "4G", 4 * 2**30),
        ("kv_cache_memory_bytes", "1T", 2**40),
        ("kv_cache_memory_bytes", "3g", 3 * 10**9),
        ("max_logprobs", "-1", -1),
        ("seed", str(2**64 - 1), 2**64 - 1),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("gpu_memory_utilization", 1, 1.0),
        ("skip_tokenizer_init", "YES", True),
        ("skip_tokenizer_init", "off", False),
        ("skip_tokenizer_init", True, True),
        ("prefer", "a,b, c", ["a", "b", "c"]),
        ("prefer", ["a,b", "c"], ["a", "b", "c"]),
        ("prefer", "", []),
        ("hf_overrides", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("hf_overrides", {"a": 1}, {"a": 1}),
        ("model", Path("/m"), "/m"),
    ],
)
def test_parses(field: str, raw: Any, value: Any) -> None:
    parsed = parse(field, raw)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("field", "raw", "words"),
    [
        ("max_model_len", "1.5", "whole number"),
        ("max_model_len", "1.0001k", "whole number"),
        ("max_model_len", "4Q", "whole number"),
        ("max_model_len", "1e3", "whole number"),
        ("max_model_len", "٤", "whole number"),
        ("max_model_len", True, "whole number"),
        ("max_model_len", 4.0, "whole number"),
        ("max_model_len", "0", "at least 1"),
        ("block_size", None, "whole number"),
        ("block_size", "512", "at least 1 and at most 256"),
        ("gpu_memory_utilization", "0", "above 0 and at most 1"),
        ("gpu_memory_utilization", "1.01", "above 0 and at most 1"),
        ("gpu_memory_utilization", "nan", "a number"),
        ("gpu_memory_utilization", 10**400, "a number"),
        ("gpu_memory_utilization", False, "a number"),
        ("skip_tokenizer_init", "maybe", "true or false"),
        ("skip_tokenizer_init", 1.5, "true or false"),
        ("dtype", "float8", "no value 'float8'"),
        ("model", " ", "text"),
        ("model", False, "text"),
        ("prefer", ["a", 1], "commas"),
        ("prefer", 5, "commas"),
        ("hf_overrides", "[1]", "JSON object"),
        ("hf_overrides", "{", "JSON object"),
        ("hf_overrides", "[" * 100_000, "JSON object"),
        ("hf_overrides", {1: 2}, "JSON object"),
        ("num_gpu_blocks_override", "1", "at least 2"),
        ("max_logprobs", "-2", "at least -1"),
    ],
)
def test_refuses_under_the_given_spelling(field: str, raw: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        parse(field, raw)
    assert str(error.value).startswith("--x ")


SUFFIX = {
    "": 1,
    "k": 10**3,
    "K": 2**10,
    "m": 10**6,
    "M": 2**20,
    "g": 10**9,
    "G": 2**30,
    "t": 10**12,
    "T": 2**40,
}


@given(st.integers(1, 10**9), st.sampled_from(sorted(SUFFIX)))
def test_suffix_multiplies_exactly(number: int, suffix: str) -> None:
    assert parse("kv_cache_memory_bytes", f"{number}{suffix}") == number * SUFFIX[suffix]


@given(st.integers(0, 10**6), st.integers(1, 999))
def test_decimal_thousands_have_no_float_error(whole: int, thousandths: int) -> None:
    assert parse("kv_cache_memory_bytes", f"{whole}.{thousandths:03}k") == whole * 1000 + thousandths


@given(
    st.sampled_from(sorted(setting_fields())),
    st.text(max_size=20) | st.integers() | st.booleans() | st.none(),
)
def test_whatever_comes_is_a_value_or_a_usage_error(field: str, raw: Any) -> None:
    try:
        value = parse(field, raw)
    except UsageError:
        return
    assert parse(field, value) == value, "a parsed value parses to itself"


def test_merge_takes_what_is_given_and_leaves_the_rest() -> None:
    args, origins = merge(EngineArgs, {"seed": Entry("5", "--seed", "--seed")})
    assert args == EngineArgs(seed=5)
    assert origins.pop("seed") == "--seed" and set(origins.values()) == {"default"}
