"""What was compared and with what: checkpoints by the hashes of their weights, libraries by their versions."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from importlib import metadata

from ...engine._version import __version__
from .report import CheckpointInfo
from .stream import Source

LIBRARIES = ("torch", "tokenizers", "safetensors", "transformers", "numpy")


def describe(source: Source, *, hashes: bool) -> CheckpointInfo:
    """A checkpoint; `hashes` reads all of its weights."""
    model, files = source.config.model, source.checkpoint.files
    digests = {}
    for file in files if hashes else ():
        with file.path.open("rb") as handle:
            digests[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return CheckpointInfo(
        folder=model.model, name=model.served_model_name, architecture=model.architecture,
        quantization=model.quantization, schemes=dict(Counter(matrix.stored for matrix in source.matrices)),
        weight_bytes=sum(file.size for file in files), sha256=digests, toy_model=model.is_demo,
    )


def libraries() -> dict[str, str]:
    """Versions of what computed the report."""
    return {"nybble": __version__, "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES}}
