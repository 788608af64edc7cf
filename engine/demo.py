"""The embedded model: a random two-layer Llama of about a megabyte, written on first use."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from ..plugins import env
from ..plugins.log import get_logger
from .args import EngineArgs

log = get_logger(__name__)

DEMO_NAME = "nybble-demo"
DEMO_NOTICE = "nybble-demo is a toy model with random weights: what it writes is noise, not language."
# Part of the folder's name: a change to what is written here must change it.
DEMO_VERSION = "random-1"
SPECIALS = ("<|begin_of_text|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "nybble_demo": True,
    "torch_dtype": "float32",
    "vocab_size": len(SPECIALS) + 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def resolve_demo(args: EngineArgs) -> EngineArgs:
    """The args with `nybble-demo` replaced by its folder; other models pass through."""
    return replace(args, model=str(demo_checkpoint())) if args.model == DEMO_NAME else args


def demo_checkpoint() -> Path:
    """The demo's folder, written once and published by rename, so that two processes cannot disturb each other.

    A damaged copy is replaced; where the cache cannot be written, a temporary folder takes its place.
    """
    root = Path(env.read_str("NYBBLE_CACHE_DIR") or platformdirs.user_cache_dir("nybble"))
    folder = root / f"{DEMO_NAME}-{DEMO_VERSION}"
    try:
        if is_complete(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".demo-", dir=root))
        scratch.chmod(0o755)  # mkdtemp's 0700 would lock other users of a shared cache out
        write_demo(scratch)
        publish(scratch, folder)
        return folder
    except OSError as error:
        log.warning("the demo goes to a temporary folder: cannot use %s (%s)", root, error)
        folder = Path(tempfile.mkdtemp(prefix="nybble-")) / DEMO_NAME
        folder.mkdir()
        write_demo(folder)
        return folder


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def publish(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`. One that is there already wins if it is whole, and is moved away if not."""
    try:
        scratch.replace(folder)
    except OSError:
        if not is_complete(folder):
            folder.replace(scratch.with_suffix(".damaged"))
            scratch.replace(folder)
            shutil.rmtree(scratch.with_suffix(".damaged"))
        else:  # another process was first; its copy is the same
            shutil.rmtree(scratch)


def write_demo(folder: Path) -> None:
    """Write the whole checkpoint: weights, tokenizer, template, configs."""
    from safetensors.numpy import save_file

    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    generation = {"bos_token_id": 0, "eos_token_id": [1, SPECIALS.index("<|im_end|>")], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _weights() -> dict[str, np.ndarray]:
    """Seeded weights of unit gain. Output rows of bytes that do not print are zero: greedy noise stays readable."""
    rng = np.random.default_rng(0)

    def matrix(out: int, size: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((out, size)) * gain / math.sqrt(size)).astype(np.float32)

    c, d = CONFIG, CONFIG["hidden_size"]
    q, kv = (c[heads] * c["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    mid = c["intermediate_size"]
    head = matrix(c["vocab_size"], d, 4.0)
    printable = np.zeros(c["vocab_size"], bool)
    printable[len(SPECIALS) + 32 : len(SPECIALS) + 127] = True
    head[~printable] = 0
    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], d, math.sqrt(d)), "lm_head.weight": head,
               "model.norm.weight": np.ones(d, np.float32)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, out, size in (("self_attn.q_proj", q, d), ("self_attn.k_proj", kv, d), ("self_attn.v_proj", kv, d),
                                ("self_attn.o_proj", d, q), ("mlp.gate_proj", mid, d), ("mlp.up_proj", mid, d),
                                ("mlp.down_proj", d, mid)):
            weights[f"{layer}.{name}.weight"] = matrix(out, size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = np.ones(d, np.float32)
    return weights


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, after the special tokens: id = byte + len(SPECIALS)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(SPECIALS)}
    vocab.update({char: len(SPECIALS) + byte for byte, char in enumerate(byte_alphabet())})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[2], "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }))


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255 (the byte-level BPE convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
