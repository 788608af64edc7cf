"""The header of one safetensors file, parsed without trust: what is stored, as what, and where.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of length, a JSON object, the
data. It is parsed here and not by the safetensors library, which accepts duplicate keys and 100 MB of header,
and whose errors name neither file nor tensor.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .problems import Problem, show

MAX_HEADER_BYTES = 32 << 20
MAX_DIMS = 64
MAX_SIZE = 2**63 - 1
LFS_MARK = b"version https://git-lfs"
LFS_POINTER = "a Git LFS pointer to the file (run `git lfs pull`)"
FIELDS = frozenset({"dtype", "shape", "data_offsets"})


class DType(NamedTuple):
    """An element type of the format: its size, and the attribute of `torch` that is the same type, if any.

    F4 and F6 have none: torch counts packed pairs where the file counts elements.
    """

    bits: int
    torch_name: str | None


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool"),
    "F4": DType(4, None),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "I16": DType(16, "int16"),
    "U16": DType(16, "uint16"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16"),
    "I32": DType(32, "int32"),
    "U32": DType(32, "uint32"),
    "F32": DType(32, "float32"),
    "C64": DType(64, "complex64"),
    "F64": DType(64, "float64"),
    "I64": DType(64, "int64"),
    "U64": DType(64, "uint64"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One stored tensor: `nbytes` bytes at byte `offset` of `file`; `dtype` is a key of DTYPES."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One weight file: its name in the folder, where it lies, and what must not change while it is used."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def read_header(file: FileInfo, max_tensors: int) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """The sound tensors of one file, and every fault found."""

    def refused(expected: str, found: object) -> tuple[dict[str, TensorInfo], list[Problem]]:
        return {}, [Problem(file.name, None, expected, str(found))]

    try:
        with file.path.open("rb") as handle:
            mark = handle.read(len(LFS_MARK))
            if mark == LFS_MARK:
                return refused("weights", LFS_POINTER)
            size = int.from_bytes(mark[:8], "little")
            if size > MAX_HEADER_BYTES:
                return refused(f"a header of at most {MAX_HEADER_BYTES} bytes", f"{size}: not safetensors?")
            if file.size < 8 + size:
                return refused(f"a file of {8 + size} bytes or more", f"{file.size}: truncated")
            handle.seek(8)
            header = strict_json(handle.read(size))
    except (OSError, ValueError) as error:
        return refused("a JSON header", error)
    if not isinstance(header, dict):
        return refused("a JSON object as header", reprlib.repr(header))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return refused("__metadata__ of text only", reprlib.repr(metadata))
    if len(header) > max_tensors:
        return refused(f"at most {max_tensors} tensors", len(header))
    entries = {key: _read_tensor(file.name, key, entry, 8 + size) for key, entry in header.items()}
    bad = [entry for entry in entries.values() if isinstance(entry, Problem)]
    good = {key: entry for key, entry in entries.items() if isinstance(entry, TensorInfo)}
    # What looks like a hole may be the place of a broken entry, so the layout is judged only without those.
    return good, bad or list(_check_layout(file, 8 + size, good))


def _read_tensor(file: str, key: str, entry: Any, start: int) -> TensorInfo | Problem:
    """One entry of a header checked by itself; `start` is the byte of the file where its data begins."""

    def fault(expected: str, found: object) -> Problem:
        return Problem(file, key, expected, reprlib.repr(found))  # bounded in length and in depth

    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        return fault(f"an object of {', '.join(sorted(FIELDS))}", entry)
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        return fault(f"a dtype of {', '.join(DTYPES)}", dtype)
    if not _sizes(shape) or len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > MAX_SIZE:
        return fault(f"a shape of at most {MAX_DIMS} sizes and 2^63 values", shape)
    if not _sizes(span) or len(span) != 2 or span[0] > span[1]:
        return fault("data_offsets [begin, end]", span)
    nbytes, bits = span[1] - span[0], math.prod(shape) * known.bits
    if bits != 8 * nbytes:
        return fault(f"{bits / 8:.16g} bytes of data for {dtype} {shape}", nbytes)
    return TensorInfo(file=file, dtype=dtype, shape=tuple(shape), offset=start + span[0], nbytes=nbytes)


def _sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative 64-bit integers (`True` is not one)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)


def _check_layout(file: FileInfo, start: int, tensors: dict[str, TensorInfo]) -> Iterator[Problem]:
    """Every data byte must belong to exactly one tensor, and the data must end where the file ends."""
    end = max((info.offset + info.nbytes for info in tensors.values()), default=start)
    if end > file.size:
        for key, info in tensors.items():
            if info.offset + info.nbytes > file.size:
                yield Problem(file.name, key, f"a file of {end} bytes", f"{file.size}: truncated")
        return
    position, before = start, "the header"
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            found = f"byte {info.offset}, which {'overlaps' if info.offset < position else 'leaves a hole'}"
            yield Problem(file.name, key, f"its data at byte {position}, after {before}", found)
        position, before = max(position, info.offset + info.nbytes), show(key)
    if position < file.size:
        yield Problem(file.name, None, f"its end at byte {position}, after {before}",
                      f"{file.size - position} bytes more")


def strict_json(text: bytes) -> Any:
    """JSON in UTF-8 without duplicate keys, NaN or Infinity. Raises ValueError, for endless nesting too."""
    if text.startswith(LFS_MARK):
        raise ValueError(LFS_POINTER)
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {show(twice)}")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
