"""The embedded model: nybble-demo in four forms, found in the package and checked before it is used."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from ..plugins.errors import CheckpointError
from .args import DEMO_FORMS, EngineArgs

DEMO_NOTICE = (
    "nybble-demo is a toy model: it adds, sorts, copies, reverses and capitalizes, and knows no language "
    "(try '345+678=' or 'sort 52 17 80 33=')."
)
# A path and not an import: the models package brings torch with it, which the command line can do without here.
WEIGHTS = Path(__file__).parent.parent / "models" / "demo" / "weights"
SUMS = "SHA256SUMS"


def resolve_demo(args: EngineArgs) -> EngineArgs:
    """The args with a name of the demo replaced by its folder; other models pass through."""
    if args.model not in DEMO_FORMS:
        return args
    name = args.served_model_name or args.model
    return replace(args, model=str(demo_checkpoint(DEMO_FORMS[args.model])), served_model_name=name)


def demo_checkpoint(form: str, weights: Path = WEIGHTS) -> Path:
    """The folder of a form ("bf16", "fp8", "awq" or "gptq"), its files compared with their SHA-256.

    Raises CheckpointError when a file is missing or is not the one that was published.
    """
    folder = weights / form
    try:
        for line in (folder / SUMS).read_text(encoding="ascii").splitlines():
            digest, name = line.split()
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise CheckpointError("the embedded model is not as it was published", found=str(folder / name),
                                      fix="install nybble again")
    except OSError as error:
        raise CheckpointError("the embedded model is not whole", found=error, fix="install nybble again") from error
    return folder
