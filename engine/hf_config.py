"""Read a checkpoint folder's JSON files, and decide from them what the engine must know; no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..plugins.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
DTYPES = ("float32", "bfloat16", "float16")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
# RoPE types whose max_position_embeddings is the length before scaling; llama3 and longrope state the scaled
SCALED_ROPE = ("linear", "dynamic", "yarn")
# files of quantization tools that name the method only by being there
SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
OTHER_FORMATS = {
    "adapter_config.json": "this is a LoRA adapter: merge it into its base model (peft's merge_and_unload)",
    "params.json": "this is Mistral's or Meta's own format: use the model's Hugging Face version",
    "model_index.json": "this is a diffusers pipeline, which nybble does not serve",
}


class Derived(NamedTuple):
    """A value read from the checkpoint, and from which file and key."""

    value: Any
    origin: str


def read_checkpoint(model: str, overrides: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's absolute folder, and its config.json with `overrides` laid over its top-level keys.

    Raises CheckpointError when there is no such folder, no readable config.json, or no text model in it.
    """
    folder = Path(model).expanduser().absolute()
    if not folder.is_dir():
        raise _no_folder(model, folder)
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    hf = read_json(folder / "config.json") | overrides
    names = hf.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{folder / 'config.json'} does not say which architecture it is",
            found=f"architectures: {json.dumps(names)}",
            fix="""name it: --hf-overrides '{"architectures": ["LlamaForCausalLM"]}'""",
        )
    if nested := next((key for key in ("text_config", "llm_config") if isinstance(hf.get(key), dict)), None):
        raise CheckpointError(
            f"{names[0]} is a multi-modal checkpoint, and nybble serves text models only",
            found=f"{nested} nested in {folder / 'config.json'}",
            fix="use the text-only checkpoint of this model family",
        )
    return folder, hf


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB. Raises CheckpointError otherwise."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be a config", found=f"{size} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", found=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON", found=error, fix="download it again; the file may be cut short"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", found=type(value).__name__)
    return value


def _no_folder(model: str, folder: Path) -> CheckpointError:
    if folder.exists():
        return CheckpointError(
            f"{model} is a file; nybble serves checkpoint folders",
            found=f"{folder.stat().st_size} bytes, {folder.suffix or 'no'} suffix",
            fix="point at a folder with config.json, tokenizer.json and *.safetensors",
        )
    if HUB_ID.fullmatch(model):
        name = model.rpartition("/")[2]
        return CheckpointError(
            f"{model} is not a folder here; nybble serves local folders and downloads nothing",
            found=f"no such folder: {folder}",
            fix=f"hf download {model} --local-dir {name}   and then   nybble serve ./{name}",
        )
    return CheckpointError(
        f"there is no checkpoint folder {folder}",
        fix="check the path, or download a model: hf download ORG/NAME --local-dir NAME",
    )


def _no_config(folder: Path) -> CheckpointError:
    names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    fix = next((text for name, text in OTHER_FORMATS.items() if name in names), None)
    if fix is None and any(n.endswith(".gguf") for n in names):
        fix = "GGUF files are not served; use the model's safetensors version"
    return CheckpointError(
        f"{folder} has no config.json",
        found=shown or "an empty folder",
        fix=fix or "download the whole checkpoint: hf download ORG/NAME --local-dir NAME",
    )


def context_length(hf: dict[str, Any]) -> Derived | None:
    """Longest sequence the checkpoint was made for, in tokens, after RoPE scaling; None when it does not say.

    The rule is vLLM's: linear, dynamic and yarn multiply by `factor` (yarn from its original length), other
    types already state the scaled length.
    """
    key = next((k for k in LENGTH_KEYS if hf.get(k) is not None), None)
    if key is None:
        return None
    length, origin = _number(hf[key], key, whole=True), f"config.json {key}"
    where = next((k for k in ("rope_scaling", "rope_parameters") if hf.get(k)), None)
    rope = hf[where] if where and isinstance(hf[where], dict) else {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in SCALED_ROPE or rope.get("factor") is None:
        return Derived(int(length), origin)
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and original is not None:
        length = _number(original, f"{where}.original_max_position_embeddings", whole=True)
        origin = f"config.json {where}.original_max_position_embeddings"
    length *= _number(rope["factor"], f"{where}.factor")
    return Derived(int(length), f"{origin} x {where}.factor")


def checkpoint_dtype(hf: dict[str, Any]) -> Derived | None:
    """The dtype the checkpoint was saved in, as a torch name; None when it does not say."""
    key = next((k for k in ("dtype", "torch_dtype") if hf.get(k) is not None), None)
    if key is None:
        return None
    if hf[key] not in DTYPES:
        raise CheckpointError(
            f"config.json has a {key} that nybble does not compute in",
            found=json.dumps(hf[key]),
            known=DTYPES,
            fix="choose one: --dtype bfloat16",
        )
    return Derived(hf[key], f"config.json {key}")


def quantization_of(hf: dict[str, Any], folder: Path) -> Derived | None:
    """The quantization method that config.json names, or a tool's own file beside it; None if unquantized."""
    settings = quantization_settings(hf, folder)
    if settings is None:
        return None
    method = settings.value.get("quant_method", SIDECARS.get(settings.origin))
    if not isinstance(method, str):
        raise CheckpointError(f"{settings.origin} names no quant_method", found=json.dumps(settings.value)[:200])
    return Derived(method, settings.origin)


def quantization_settings(hf: dict[str, Any], folder: Path) -> Derived | None:
    """The object that describes a checkpoint's quantization, and where it stands; None if there is none."""
    for key in ("quantization_config", "compression_config"):
        if hf.get(key) is not None:
            if not isinstance(hf[key], dict):
                raise CheckpointError(f"config.json {key} names no quant_method", found=json.dumps(hf[key])[:200])
            return Derived(hf[key], f"config.json {key}")
    for name in SIDECARS:
        if (folder / name).is_file():
            return Derived(read_json(folder / name), name)
    return None


def read_generation_config(folder: Path, hf: dict[str, Any], mode: str) -> dict[str, Any]:
    """generation_config.json ({} when absent), reduced to its end tokens when `mode` is "vllm"."""
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    if mode == "vllm":
        config = {k: v for k, v in config.items() if k == "eos_token_id"}
    for source, name in ((config, path.name), (hf, "config.json")):
        _check_end_tokens(source.get("eos_token_id"), name)
    return config


def _check_end_tokens(eos: Any, where: str) -> None:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(
            f"eos_token_id in {where} must be a token id or a list of them", found=json.dumps(eos)[:200]
        )


def vocabulary_size(hf: dict[str, Any]) -> int:
    """Rows of the embedding."""
    if "vocab_size" not in hf:
        raise CheckpointError("config.json has no vocab_size")
    return int(_number(hf["vocab_size"], "vocab_size", whole=True))


def _number(value: Any, key: str, *, whole: bool = False) -> float:
    """A number of at least 1."""
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not 1 <= value < 2**53:
        raise CheckpointError(
            f"{key} in config.json must be a {'whole ' if whole else ''}number of at least 1",
            found=json.dumps(value)[:80],
        )
    return float(value)
