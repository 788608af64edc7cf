"""What a checkpoint folder holds, from the headers of its weight files alone: no torch, no weights read."""

from __future__ import annotations

import re
import reprlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...plugins.errors import CheckpointError
from .header import MAX_HEADER_BYTES, FileInfo, TensorInfo, read_header, strict_json
from .problems import Problem, refuse, show

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
MAX_TENSORS = 200_000
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")

_FROM_HF = (
    "python -c \"from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained('IN').save_pretrained('OUT')\""
)
_FROM_STATE = (
    "python -c \"import torch, safetensors.torch as s; "
    "s.save_file(torch.load('IN', weights_only=True), 'OUT/model.safetensors')\""
)
# Known only to be refused: unpickling runs code, and GGUF is another engine's layout.
CONVERSIONS: dict[str, str] = {
    ".bin": _FROM_HF,
    ".pt": _FROM_STATE,
    ".pth": _FROM_STATE,
    ".ckpt": _FROM_STATE,
    ".gguf": _FROM_HF.replace("('IN')", "('IN', gguf_file='FILE.gguf')"),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder of sound weight files: headers parsed, every byte of data owned by exactly one tensor.

    `unused` are the names of `*.safetensors` files beside them that nothing refers to.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    files: tuple[FileInfo, ...]
    unused: tuple[str, ...]


def scan(folder: Path, *, max_tensors: int = MAX_TENSORS) -> Checkpoint:
    """Read the headers of the weight files of `folder`.

    The files are those that `model.safetensors.index.json` names; without an index `model.safetensors`;
    without that every `*.safetensors`, except `consolidated*` copies beside other files.

    Raises CheckpointError that lists every fault with file, tensor, expected and found.
    """
    try:
        root = folder.resolve(strict=True)
        entries = sorted(path.name for path in root.iterdir())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{folder} is not a folder that can be read", found=str(error)) from error
    faults: list[Problem] = []
    index = _read_index(root, faults) if INDEX in entries else None
    names = _pick(entries, folder) if index is None else sorted(set(index.values()))
    faults += _missing_shards(names)
    files: list[FileInfo] = []
    sound: set[str] = set()
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        file = locate(root, name)
        if isinstance(file, Problem):
            faults.append(file)
            continue
        files.append(file)
        header, found = read_header(file, max_tensors - len(tensors))
        faults += found
        if not found:
            sound.add(name)
        for key, info in header.items():
            first = tensors.setdefault(key, info)
            if first is not info:
                faults.append(Problem(f"{first.file} and {name}", key, "a tensor in one file", "it in both"))
    if index is not None:
        faults += _compare(index, tensors, sound)
    if faults:
        raise refuse(f"the weight files of {folder} are refused", faults,
                     fix="fetch the named files again, from where you trust")
    return Checkpoint(folder=root, tensors=tensors, files=tuple(files), unused=_unused(entries, names))


def locate(root: Path, name: str) -> FileInfo | Problem:
    """The file that `name` stands for, if it may be read; `root` is resolved.

    A link is followed when it ends inside `root`, or inside the same `models--*` repository of the Hugging
    Face cache, where `snapshots/<revision>` is a folder of links to `../../blobs/<hash>`.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return Problem(name, None, "a file inside the folder", f"the path {show(name)}")
    cache = root.parent.parent if root.parent.name == "snapshots" else root
    home = cache if cache.name.startswith("models--") else root
    try:
        path = (root / name).resolve(strict=True)
        status = path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no path at all, such as "\0"
        return Problem(name, None, "a readable file", getattr(error, "strerror", None) or str(error))
    if not path.is_relative_to(home):
        return Problem(name, None, "a file inside the folder", f"a link to {path}")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        return Problem(name, None, "a regular file", stat.filemode(status.st_mode))
    return FileInfo(name=name, path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _pick(entries: Sequence[str], folder: Path) -> list[str]:
    """Weight files of a folder without an index. Raises CheckpointError when there are none."""
    if SINGLE in entries:
        return [SINGLE]
    names = [name for name in entries if name.endswith(SUFFIX)]
    if names:
        return [name for name in names if not name.startswith("consolidated")] or names
    other = next((name for suffix in CONVERSIONS for name in entries if name.endswith(suffix)), None)
    if other is None:
        raise CheckpointError(f"{folder} has no weight files", found=f"{len(entries)} other files",
                              known=[SINGLE, INDEX, f"*{SUFFIX}"])
    raise CheckpointError(f"{folder} has no safetensors files, and no other format is read", found=other,
                          fix=f"convert it once, if you trust it: {CONVERSIONS[Path(other).suffix]}")


def _unused(entries: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Weight files that are left out; `consolidated*`, a second copy that its makers ship, is meant to be."""
    return tuple(name for name in entries
                 if name.endswith(SUFFIX) and name not in names and not name.startswith("consolidated"))


def _missing_shards(names: Sequence[str]) -> Iterator[Problem]:
    """Shards that are not named but whose siblings `x-00001-of-00003` promise them."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    for stem, of in sorted({(m[1], m[3]) for m in shards}):
        have = {int(m[2]) for m in shards if (m[1], m[3]) == (stem, of)}
        missing = [f"{n:05}" for n in range(1, int(of) + 1) if n not in have]
        if missing:
            yield Problem(f"{stem}-{missing[0]}-of-{of}{SUFFIX}", None, f"{int(of)} shards",
                          f"{len(have)}, without {reprlib.repr(missing)}")


def _read_index(root: Path, faults: list[Problem]) -> dict[str, str]:
    """`weight_map` of the index: tensor -> file. Faults are added to `faults`."""
    file = locate(root, INDEX)
    if isinstance(file, Problem):
        faults.append(file)
        return {}
    try:
        if file.size > MAX_HEADER_BYTES:
            raise ValueError(f"{file.size} bytes")
        content = strict_json(file.path.read_bytes())
    except (OSError, ValueError) as error:
        faults.append(Problem(INDEX, None, f"JSON of at most {MAX_HEADER_BYTES} bytes", str(error)))
        return {}
    index = content.get("weight_map") if isinstance(content, dict) else None
    if isinstance(index, dict) and index and all(isinstance(name, str) for name in index.values()):
        return index
    faults.append(Problem(INDEX, None, "weight_map, an object {tensor: file}", reprlib.repr(content)))
    return {}


def _compare(index: dict[str, str], tensors: dict[str, TensorInfo], sound: set[str]) -> Iterator[Problem]:
    """Where index and files disagree. A file with faults of its own may well hold what seems missing."""
    for key, name in index.items():
        if name in sound and (key not in tensors or tensors[key].file != name):
            yield Problem(name, key, f"it here, as {INDEX} says", "no such tensor")
    for key, info in tensors.items():
        if key not in index:
            yield Problem(info.file, key, f"only tensors that {INDEX} names", str(info))
