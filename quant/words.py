"""What AWQ and GPTQ share: int32 words unpacked, settings read, and whether a matrix is stored in codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..plugins.errors import CheckpointError
from .base import FLOAT_SOURCES, Found
from .evidence import check_plain, contradiction, describe, unsupported

REQUIRED = object()


def block(bits: int) -> tuple[int, int]:
    """(codes, words) of the smallest run of int32 words whose end no code of `bits` bits straddles."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words [W, C] -> int32 codes [W * 32 / bits, C]: along dimension 0 the words are one stream of bits,
    lowest first, so that a 3-bit code may lie in two words. W must be whole blocks (`block`).
    """
    codes, per_block = block(bits)
    first = torch.arange(codes, device=words.device, dtype=torch.int32) * bits
    shift = (first % 32)[:, None]
    blocks = words.unflatten(0, (-1, per_block))
    if per_block == 1:
        return ((blocks >> shift) & ((1 << bits) - 1)).flatten(0, 1)
    word = (first // 32).long()
    # Shifting an int32 right drags its sign along: keep only the bits that are there, then add the next word's.
    here = (32 - shift).clamp(max=bits)
    low = (blocks[:, word] >> shift) & ((1 << here) - 1)
    high = (blocks[:, (word + 1).clamp(max=per_block - 1)] << here) & ((1 << bits) - 1)
    return torch.where(here < bits, low | high, low).flatten(0, 1)


def unpack_range(words: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Codes [start, stop) along dimension 0 of `unpack(words, bits)`, unpacking only the blocks they lie in."""
    codes, per_block = block(bits)
    first = start // codes
    unpacked = unpack(words[first * per_block : -(-stop // codes) * per_block], bits)
    return unpacked[start - first * codes : stop - first * codes]


def setting(config: Mapping[str, Any], names: Iterable[str], kind: type, default: Any = REQUIRED) -> Any:
    """The value under the first of `names` that the quantization config has; null counts as absent."""
    names = tuple(names)
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"quantization config: {name} must be {kind.__name__}", found=repr(value))
        return value
    if default is REQUIRED:
        raise CheckpointError(f"quantization config has no {' or '.join(names)}", found=", ".join(config) or "nothing",
                              fix="add it to quantization_config in config.json")
    return default


def one_of(name: str, value: Any, known: Iterable[Any]) -> Any:
    """`value`, refused by name when it is not among `known`."""
    known = tuple(known)
    if value not in known:
        raise unsupported(name, value, known)
    return value


def group_size(config: Mapping[str, Any], *names: str) -> int | None:
    """Values along K that share a scale; None (written -1): the whole row."""
    size = setting(config, names, int)
    if size != -1 and size < 1:
        raise CheckpointError("quantization config: group_size must be positive, or -1 for whole rows", found=size)
    return None if size == -1 else size


def is_packed(name: str, found: Found | None, *, expected: bool, skip: str | None) -> bool:
    """Whether a matrix is stored in codes: what is stored decides, without it the config.

    Args:
        expected: what the config says.
        skip: the rule of the config that leaves this matrix in floating point, if any.

    Raises CheckpointError: a rule leaves it out but codes are stored, or neither codes nor a weight are.
    """
    if found is None:
        return expected and skip is None
    if "qweight" in found:
        if skip is not None:
            raise contradiction(name, f"unquantized, by the rule {skip!r}", found, "remove the rule")
        return True
    if "weight" not in found and expected and skip is None:
        raise contradiction(name, "quantized, so a qweight (or a plain weight) is stored", found)
    check_plain(name, "a qweight or a plain weight", found)
    return False


def check_stored(name: str, found: Found, tensors: Iterable[str]) -> torch.dtype:
    """The type of a quantized matrix's scales. Raises CheckpointError when that is none, or one of its `tensors` is
    missing."""
    missing = [tensor for tensor in tensors if tensor not in found]
    if missing:
        raise CheckpointError(f"{name} is stored quantized, but has no {' and no '.join(missing)}",
                              found=describe(found))
    dtype = found["scales"].dtype
    if dtype not in FLOAT_SOURCES:
        raise CheckpointError(f"{name}: scales must be float32, float16 or bfloat16", found=describe(found))
    return dtype


def check_groups(name: str, in_features: int, size: int | None, found: Found) -> None:
    """Raises CheckpointError when scales [groups, N] are not for groups of `size` (None: all) of `in_features`."""
    said = 1 if size is None else -(-in_features // size)
    groups = found["scales"].shape[0] if found["scales"].shape else 0
    if groups != said:
        fits = f"group size {-(-in_features // groups)}" if groups else "no group size"
        raise contradiction(name, f"group size {size or -1}, so {said} rows of scales for {in_features} inputs",
                            found, f"the scales fit {fits}: correct group_size in quantization_config")
