"""Three tiny tokenizers, one of each kind that checkpoints have, and engine configs that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nybble.engine.config import EngineConfig, ModelConfig, SchedulerConfig
from nybble.engine.text.tokenizer import Tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CORPUS = ["the cat sat on the mat", "naïve café ñandú", "中文分词 中文 字", "😀😀👍🏽 emoji",
          "def f(x):\n    return x"]


def byte_level_backend() -> Backend:
    """GPT-2, Llama 3, Qwen2: bytes as letters; tokens may end inside a character."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS,
                                                            initial_alphabet=alphabet, show_progress=False))
    return backend


def byte_fallback_backend() -> Backend:
    """Llama 2, Mistral: pieces with ▁ for a space, and a token per byte for characters without a piece."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghit中",
              "▁a", "▁t", "ab", "▁ab", "th", "▁th"]
    merges = [("▁", "a"), ("▁", "t"), ("a", "b"), ("▁a", "b"), ("t", "h"), ("▁t", "h")]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges,
                                 byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return backend


def word_backend() -> Backend:
    """No decoder: tokens are joined by spaces."""
    words = [*SPECIALS, *["the", "cat", "sat", "on", "mat", "naïve", "中文", "�"]]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return backend


BACKENDS = {"byte_level": byte_level_backend, "byte_fallback": byte_fallback_backend, "word": word_backend}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: Tokenizer(make(), NAMES) for name, make in BACKENDS.items()}


@pytest.fixture(scope="session", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each of the three in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def byte_level(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_level"]


@pytest.fixture(scope="session")
def byte_fallback(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_fallback"]


@pytest.fixture(scope="session")
def write_tokenizer():
    """write_tokenizer(folder, kind, **tokenizer_config): a checkpoint's tokenizer files."""

    def write(folder: Path, kind: str = "byte_level", **config: Any) -> Path:
        BACKENDS[kind]().save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def engine_config():
    """engine_config(tokenizer, **model settings): 64 tokens of context, ten rows more than needed."""

    def make(tokenizer: Tokenizer | None = None, *, policy: str = "fcfs", **model: Any) -> EngineConfig:
        settings = {
            "model": "m", "served_model_name": "m", "tokenizer": None, "hf_config": {},
            "architecture": "Llama", "dtype": "float32", "max_model_len": 64,
            "vocab_size": tokenizer.vocab_size + 10 if tokenizer else 100, **model,
        }
        scheduler = SchedulerConfig(scheduling_policy=policy)
        return EngineConfig(model=ModelConfig(**settings), scheduler=scheduler)

    return make
