"""Flags made from settings, and help in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.args import setting_fields
from nybble.engine.cli import verb_parser
from nybble.engine.cli.parser import ENGINE_GROUPS, SERVER_FIELDS, Parser, add_engine_flags, engine_args
from nybble.plugins.errors import UsageError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parser() -> Parser:
    parser = verb_parser("serve")
    add_engine_flags(parser)
    return parser


def values(parser: Parser, *argv: str) -> dict[str, Any]:
    """The settings that these flags change, by field."""
    args, origins = engine_args(parser.parse(argv))
    return {name: getattr(args, name) for name, origin in origins.items() if origin != "default"}


@pytest.mark.parametrize(
    ("argv", "settings"),
    [
        ((), {}),
        (("folder",), {"model": "folder"}),
        (("--model", "folder"), {"model": "folder"}),
        (("folder", "--model=folder"), {"model": "folder"}),
        (("--max-model-len", "8k"), {"max_model_len": 8000}),
        (("--max_model_len=8K", "folder"), {"max_model_len": 8192, "model": "folder"}),
        (("--gpu-memory-utilization", ".5"), {"gpu_memory_utilization": 0.5}),
        (("-tp", "1"), {"tensor_parallel_size": 1}),
        (("--no-enable-prefix-caching",), {"enable_prefix_caching": False}),
        (("--no_enable_chunked_prefill",), {"enable_chunked_prefill": False}),
        (("--trust-remote-code",), {"trust_remote_code": True}),
        (("--prefer", "a,b", "--prefer", "c"), {"prefer": ["a", "b", "c"]}),
        (("--hf-overrides", '{"a_b": 1}'), {"hf_overrides": {"a_b": 1}}),
        (("--chat-template", "a_b"), {"chat_template": "a_b"}),
        (("--", "--odd_name"), {"model": "--odd_name"}),
        (("--traceback", "--", "--traceback"), {"model": "--traceback"}),
        (("--tokenizer=--traceback",), {"tokenizer": "--traceback"}),
    ],
)
def test_flags(parser: Parser, argv: tuple[str, ...], settings: dict[str, Any]) -> None:
    assert values(parser, *argv) == settings


VLLM = """attention-backend block-size chat-template distributed-executor-backend dtype enable-chunked-prefill
enable-prefix-caching generation-config gpu-memory-utilization hf-overrides kv-cache-memory-bytes load-format
logits-processors long-prefill-token-threshold max-logprobs max-model-len max-num-batched-tokens max-num-seqs
num-gpu-blocks-override quantization scheduling-policy seed served-model-name skip-tokenizer-init
tensor-parallel-size tokenizer trust-remote-code use-tqdm-on-load"""


def test_names_of_vllm_are_accepted(parser: Parser) -> None:
    assert {f"--{name}" for name in VLLM.split()} <= set(parser._option_string_actions)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--max-modle-len", "1"), "unknown flag --max-modle-len.*did you mean --max-model-len"),
        (("--max-model", "1"), "unknown flag --max-model\n.*did you mean --max-model-len"),
        (("--enforce-eagr",), "unknown flag --enforce-eagr"),
        (("--kv-cache-dtype", "fp4"), "--kv-cache-dtype"),
        (("--enable-expert-parallel",), "unknown flag --enable-expert-parallel"),
        (("--zzzz=1",), "unknown flag --zzzz\n.*--help=all"),
        (("a", "b"), "unexpected argument 'b'"),
        (("a", "--model", "b"), "two models are given.*a and --model b"),
        (("--max-model-len",), "--max-model-len: expected one argument"),
        (("--max-model-len", "x"), "--max-model-len must be a whole number"),
        (("--dtype", "int8"), "--dtype has no value 'int8'.*known: auto, float32"),
        (("--served-model-name", "--traceback"), "--served-model-name: expected one argument"),
        (("--config", "/no/such.yaml"), "--config: cannot read /no/such.yaml"),
    ],
)
def test_mistakes(parser: Parser, argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){words}"):
        values(parser, *argv)


def test_flags_win_over_environment_over_file(
    parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\nmax-queue: 1\nblock-size: 1\n")
    monkeypatch.setenv("NYBBLE_SEED", "2")
    monkeypatch.setenv("NYBBLE_MAX_QUEUE", "2")
    given = values(parser, "--config", str(tmp_path / "c.yaml"), "--seed", "3")
    assert given == {"seed": 3, "max_queue": 2, "block_size": 1}


def test_every_setting_is_in_a_group_of_the_help(parser: Parser) -> None:
    assert {f.metadata["group"] for f in setting_fields().values()} == set(ENGINE_GROUPS)
    assert not set(SERVER_FIELDS) & set(setting_fields())
    page = parser.topic_help("all")
    for name in setting_fields():
        assert f"--{name.replace('_', '-')}" in page and f"NYBBLE_{name.upper()}" in page


@pytest.mark.parametrize(
    ("topic", "present", "absent"),
    [
        ("", ["YAML file", "More flags, by group", "--max-model-len"], ["longest prompt"]),
        ("all", ["YAML file", "longest prompt", "tokens in one KV-cache block"], ["More flags"]),
        ("cache", ["tokens in one KV-cache block"], ["longest prompt", "YAML"]),
        ("max-model-len", ["longest prompt", "[NYBBLE_MAX_MODEL_LEN]"], ["KV-cache block"]),
        ("--max_model_len", ["longest prompt"], ["KV-cache block"]),
        ("block-size", ["[default: 16, NYBBLE_BLOCK_SIZE]"], ["longest"]),
        ("no-enable-prefix-caching", ["[default: on,"], []),
    ],
)
def test_help_topics(parser: Parser, topic: str, present: list[str], absent: list[str]) -> None:
    page = " ".join(parser.topic_help(topic).split())
    assert all(text in page for text in present), page
    assert not any(text in page for text in absent), page


def test_help_on_nothing_known(parser: Parser, nybble: Run) -> None:
    code, _, err = nybble("serve", "--help=cash")
    assert code == 2 and "no help on 'cash'" in err and "did you mean cache?" in err
