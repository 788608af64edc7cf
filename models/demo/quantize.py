"""Make the FP8, AWQ and GPTQ forms of nybble-demo with llm-compressor, AutoAWQ and gptqmodel: not with nybble.

`python -m nybble.models.demo.quantize all --model DIR --out DIR` needs no GPU and takes minutes. Each tool runs in a
virtual environment of its own, made once from requirements-FORM.txt, since no two of them take the same transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from ...plugins.env import cache_dir
from ...plugins.errors import NybbleError, UsageError
from .checkpoint import PAD
from .rows import make_rows

FORMS = ("fp8", "awq", "gptq")
HERE = Path(__file__).parent
CALIBRATION_ROWS, CALIBRATION_SEED = 64, 2**40  # a seed that no training step has
FROM_MODEL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS, CONFIG, SUMS = "model.safetensors", "config.json", "SHA256SUMS"
# What transformers 5 calls a Mixtral's parts, and the names that checkpoints have had since there are Mixtrals.
CLASSIC = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}


def calibration_rows(count: int = CALIBRATION_ROWS) -> list[list[int]]:
    """Token ids as the model was trained on: the training split only, plain prompts and conversations, unpadded."""
    rows: list[list[int]] = make_rows(CALIBRATION_SEED, count)[0].tolist()
    for row in rows:
        while row[-1] == PAD:
            row.pop()
    return rows


def requirements(form: str) -> Path:
    return HERE / f"requirements-{form}.txt"


def environment(form: str, root: Path) -> Path:
    """The Python of a form's environment, made now unless it was before from the same requirements."""
    pins = requirements(form)
    folder = root / f"{form}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=True)
        install = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and with what it asks for: that is nothing more for its CPU build, CUDA's libraries for others
        _run(form, [*install, "--constraint", pins, "torch"])
        _run(form, [*install, "--no-deps", "--requirement", pins])
        ready.touch()
    return python


def _run(form: str, command: list[Any]) -> None:
    code = subprocess.run([str(word) for word in command], check=False).returncode
    if code:
        raise NybbleError(f"the {form} form was not made", found=f"exit code {code} of {' '.join(map(str, command))}",
                          fix="the command's own output is above")


def check_model(model: Path) -> None:
    """Refuse what is no 16-bit nybble-demo.

    Raises:
        UsageError: a file is missing, it is another model, or it is quantized already.
    """
    missing = [name for name in (CONFIG, WEIGHTS, *FROM_MODEL) if not (model / name).is_file()]
    if missing:
        raise UsageError(f"{model} is no checkpoint of nybble-demo", found=f"no {', '.join(missing)}",
                         fix="python -m nybble.models.demo.train writes one")
    config = json.loads((model / CONFIG).read_text())
    if config.get("nybble_demo") is not True:
        raise UsageError(f"{model} is not nybble-demo", found=f"architectures {config.get('architectures')}",
                         fix="other models: run the tools themselves; the calibration text here would not suit them")
    if "quantization_config" in config:
        raise UsageError(f"{model} is quantized already", found=config["quantization_config"].get("quant_method"),
                         fix="give the 16-bit form as --model")


def collect(model: Path, made: Path, out: Path) -> None:
    """Write the checkpoint: the tool's weights under their classic names and its quantization_config, all else as the
    16-bit model has it (tools rewrite tokenizers and turn sampling on), and SHA256SUMS.
    """
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    save_file({classic_name(name): tensor for name, tensor in load_file(made / WEIGHTS).items()}, out / WEIGHTS,
              metadata={"format": "pt"})
    theirs = json.loads((made / CONFIG).read_text())
    config = json.loads((model / CONFIG).read_text())
    config["torch_dtype"] = theirs.get("dtype") or theirs["torch_dtype"]
    config["quantization_config"] = theirs["quantization_config"]
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name in FROM_MODEL:
        shutil.copyfile(model / name, out / name)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(out.iterdir())]
    (out / SUMS).write_text("".join(sums))


def classic_name(name: str) -> str:
    for new, old in CLASSIC.items():
        name = name.replace(new, old)
    return name


def quantize(form: str, model: Path, out: Path, environments: Path) -> None:
    """Make one form of `model` in the new folder `out`.

    Raises:
        UsageError: `model` is not the 16-bit nybble-demo, or `out` is there already.
        NybbleError: the tool failed.
    """
    check_model(model)
    if out.exists():
        raise UsageError(f"{out} is there already", fix="remove it, or give another --out")
    python = environment(form, environments)
    with tempfile.TemporaryDirectory() as scratch:
        calibration, made = Path(scratch) / "calibration.jsonl", Path(scratch) / "made"
        calibration.write_text("".join(f"{json.dumps(row)}\n" for row in calibration_rows()))
        _run(form, [python, "-I", HERE / "quantize_worker.py", form, model.resolve(), calibration, made])
        collect(model, made, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=[*FORMS, "all"])
    parser.add_argument("--model", type=Path, required=True, help="folder of the 16-bit checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="where the folder of each form goes")
    parser.add_argument("--environments", type=Path, default=cache_dir() / "quantize",
                        help="where the tools are installed (default %(default)s)")
    args = parser.parse_args()
    try:
        for form in FORMS if args.form == "all" else (args.form,):
            started = time.monotonic()
            quantize(form, args.model, args.out / form, args.environments)
            size = (args.out / form / WEIGHTS).stat().st_size
            print(f"{args.out / form}: {size / 1e6:.2f} MB of weights, {time.monotonic() - started:.0f} s", flush=True)
    except NybbleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
