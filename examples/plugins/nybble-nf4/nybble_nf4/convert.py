"""`nybble quantize-nf4 SRC DST`: the matrices of a Llama's decoder layers become NF4, all else is copied."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.plugins.errors import CheckpointError, UsageError

from .method import BLOCK, quantize

INDEX = "model.safetensors.index.json"
MATRIX = re.compile(r"model\.layers\.\d+\..+\.weight")
COPIED = (".json", ".jinja", ".model", ".txt")


def main(argv: list[str]) -> int:
    """The command. Raises UsageError and CheckpointError."""
    parser = argparse.ArgumentParser(prog="nybble quantize-nf4", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with 16 or 32-bit *.safetensors")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; must be empty or not there")
    args = parser.parse_args(argv)
    done, left = convert(args.source, args.target)
    print(f"{args.target}: {done} matrices in NF4, {left} left as they were")
    return 0


def convert(source: Path, target: Path) -> tuple[int, int]:
    """Write `source` again as NF4 and return how many matrices of its layers became that, and how many could not.

    config.json is written last: a folder that is not finished cannot be mistaken for a model.
    """
    config = read_config(source)
    files = sorted(source.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{source} has no weights to quantize", known=["model*.safetensors"])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not an empty folder", fix="name one that does not exist")
    target.mkdir(parents=True, exist_ok=True)
    done = left = 0
    places: dict[str, str] = {}
    for file in files:
        tensors, changed, kept = convert_file(file)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        done, left = done + changed, left + kept
    if len(files) > 1:
        write_json(target / INDEX, {"metadata": {}, "weight_map": places})
    for path in source.iterdir():
        if path.suffix in COPIED and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    write_json(target / "config.json",
               {**config, "quantization_config": {"quant_method": "nf4", "block_size": BLOCK}})
    return done, left


def convert_file(file: Path) -> tuple[dict[str, Tensor], int, int]:
    """(what to store in place of `file`, its matrices that are NF4 there, those that are no whole blocks)."""
    tensors: dict[str, Tensor] = {}
    done = left = 0
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  not a dict
            tensor = stored.get_tensor(name)
            if not MATRIX.fullmatch(name) or tensor.ndim != 2:
                tensors[name] = tensor
            elif tensor.shape[1] % BLOCK:
                tensors[name], left = tensor, left + 1
            else:
                parts = quantize(tensor, name)
                tensors |= {name: parts["weight"], name.removesuffix("weight") + "absmax": parts["absmax"]}
                done += 1
    return tensors, done, left


def read_config(source: Path) -> dict[str, object]:
    """config.json of a model that is not quantized yet."""
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} has no config.json that can be read", found=error) from error
    if not isinstance(config, dict) or config.get("quantization_config"):
        raise CheckpointError(f"{source} is quantized already, or no model", fix="start from the 16-bit checkpoint")
    return config


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
