"""What is read from a checkpoint's JSON files, and how each fault in them is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine import hf_config
from nybble.plugins.errors import CheckpointError

Make = Callable[..., str]
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("changes", "length", "origin"),
    [
        ({}, 2048, "max_position_embeddings"),
        ({"n_positions": 512}, 2048, "max_position_embeddings"),
        ({"max_position_embeddings": None, "n_positions": 512}, 512, "n_positions"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            8192,
            "max_position_embeddings x rope_scaling.factor",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.5}}, 3072, "x rope_scaling.factor"),
        ({"rope_scaling": YARN}, 4000, "rope_scaling.original_max_position_embeddings x rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 4096, "x rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 2048, "max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, 2048, "max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, 2048, "max_position_embeddings"),
        ({"rope_scaling": {}, "rope_parameters": YARN}, 4000, "x rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, 2048, "max_position_embeddings"),
    ],
)
def test_context_length(checkpoint: Make, changes: dict[str, Any], length: int, origin: str) -> None:
    found = hf_config.context_length(hf_config.read_checkpoint(checkpoint(**changes), {})[1])
    assert found is not None
    assert found.value == length and found.origin.endswith(origin)


def test_no_length_is_none() -> None:
    assert hf_config.context_length({"hidden_size": 8}) is None


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("auto", {"eos_token_id": [1, 2], "temperature": 0.6}), ("vllm", {"eos_token_id": [1, 2]})],
)
def test_generation_config(tmp_path: Path, mode: str, kept: dict[str, Any]) -> None:
    assert hf_config.read_generation_config(tmp_path, {}, mode) == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    assert hf_config.read_generation_config(tmp_path, {}, mode) == kept


def test_overrides_replace_whole_top_level_keys(checkpoint: Make) -> None:
    folder = checkpoint(rope_scaling=YARN)
    path, hf = hf_config.read_checkpoint(folder, {"rope_scaling": {"type": "linear"}})
    assert (str(path), hf["rope_scaling"], hf["vocab_size"]) == (folder, {"type": "linear"}, 384)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"architectures": None}, "does not say which architecture.*found: architectures: null.*--hf-overrides"),
    ({"architectures": []}, "does not say which architecture"),
    ({"architectures": "LlamaForCausalLM"}, "does not say which architecture"),
    ({"text_config": {}}, "LlamaForCausalLM is a multi-modal checkpoint.*text_config nested in"),
    ({"torch_dtype": "float8_e4m3fn"}, 'found: "float8_e4m3fn".*known: float32.*--dtype'),
    ({"torch_dtype": 7}, "a torch_dtype that nybble does not compute in"),
    ({"dtype": ["float32"]}, "a dtype that nybble does not compute in"),
    ({"max_position_embeddings": "2048"}, "max_position_embeddings in config.json must be a whole number"),
    ({"max_position_embeddings": True}, "max_position_embeddings in config.json must be a whole number"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor in config.json must be a number"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor in config.json must be a number"),
    ({"vocab_size": None}, "no vocab_size"),
    ({"vocab_size": 0}, "vocab_size in config.json must be a whole number of at"),
    ({"eos_token_id": "</s>"}, "eos_token_id in config.json must be a token id"),
    ({"eos_token_id": [1, -1]}, "eos_token_id in config.json must be a token id"),
    ({"quantization_config": {"bits": 4}}, "names no quant_method.*bits"),
    ({"quantization_config": "awq"}, "names no quant_method"),
]


def read_everything(folder: str) -> None:
    path, hf = hf_config.read_checkpoint(folder, {})
    hf_config.checkpoint_dtype(hf)
    hf_config.context_length(hf)
    hf_config.vocabulary_size(hf)
    hf_config.quantization_of(hf, path)
    hf_config.read_generation_config(path, hf, "auto")


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_bad_key_is_named(checkpoint: Make, changes: dict[str, Any], words: str) -> None:
    read_everything(checkpoint())
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        read_everything(checkpoint(**changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    key=st.sampled_from(["max_position_embeddings", "rope_scaling", "dtype", "vocab_size", "eos_token_id"]),
    value=json_values | st.fixed_dictionaries({"type": st.just("yarn"), "factor": json_values}),
)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    hf = {"max_position_embeddings": 8, "vocab_size": 8, key: value}
    try:
        hf_config.checkpoint_dtype(hf)
        length, vocabulary = hf_config.context_length(hf), hf_config.vocabulary_size(hf)
        hf_config.read_generation_config(Path("/nowhere"), hf, "auto")
    except CheckpointError:
        return
    assert vocabulary > 0 and (length is None or length.value > 0)


FOLDERS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "empty": ({}, "has no config.json.*an empty folder.*hf download"),
    "others": ({f"f{i}": "" for i in range(12)}, "f0, f1.*and 4 more"),
    "lora": ({"adapter_config.json": "{}"}, "no config.json.*LoRA adapter"),
    "gguf": ({"model.gguf": ""}, "GGUF files are not served"),
    "cut": ({"config.json": '{"architectures": ["Lla'}, "not valid JSON.*download it again"),
    "bytes": ({"config.json": b"\xff\xfe\xff"}, "not valid JSON"),
    "list": ({"config.json": "[]"}, "must hold a JSON object.*list"),
    "deep": ({"config.json": "[" * 200_000}, "not valid JSON"),
    "large": ({"config.json": b" " * (16 * 2**20 + 1)}, "too large to be a config"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_no_checkpoint(tmp_path: Path, name: str) -> None:
    files, words = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        hf_config.read_checkpoint(str(tmp_path), {})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("meta-llama/Llama-3-8B", "local folders.*hf download meta-llama/Llama-3-8B --local-dir Llama-3-8B"),
        ("/no/such/folder", "there is no checkpoint folder /no/such/folder"),
        (__file__, "is a file; nybble serves checkpoint folders"),
    ],
)
def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        hf_config.read_checkpoint(model, {})
