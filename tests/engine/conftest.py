"""Checkpoint folders without weights, for everything that reads only their JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 2048,
    "vocab_size": 384,
    "eos_token_id": 1,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., str]:
    """checkpoint(key=value, ...) -> folder whose config.json has those changes; None takes a key out."""

    def make(**changes: Any) -> str:
        folder = tmp_path / "tiny-llama"
        folder.mkdir(exist_ok=True)
        config = {k: v for k, v in (HF_CONFIG | changes).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make
