"""What a config claims and what a checkpoint stores, compared: shared refusals of the quantization configs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..plugins.errors import CheckpointError, did_you_mean
from .base import Found, LayerShape


def describe(found: Found) -> str:
    """What is stored of a module on one line: "weight float8_e4m3fn [256, 512], weight_scale float32 []"."""
    tensors = (
        f"{name} {str(stored.dtype or 'of an unknown dtype').removeprefix('torch.')} {list(stored.shape)}"
        for name, stored in sorted(found.items())
    )
    return ", ".join(tensors) or "nothing"


def contradiction(layer: str, config: str, found: Found, fix: str | None = None) -> CheckpointError:
    """The error for a layer that is stored otherwise than its config says, with both readings."""
    return CheckpointError(f"{layer}: the quantization config and the stored tensors contradict each other",
                           found=f"config: {config}; stored: {describe(found)}", fix=fix)


def is_plain(dtype: torch.dtype | None) -> bool:
    """Whether values of this type are themselves, not codes that scales give their meaning."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize > 1


def check_plain(layer: str, config: str, found: Found) -> None:
    """Refuse a matrix that holds none of its format's codes when it holds another's. Raises CheckpointError."""
    if {"qweight", "weight_packed"} & found.keys() or ("weight" in found and not is_plain(found["weight"].dtype)):
        raise contradiction(layer, config, found, "these are another format's: correct quant_method in its config")


def unsupported(what: str, value: object, known: Iterable[object]) -> CheckpointError:
    """The error for a setting that is understood and not implemented."""
    return CheckpointError(f"quantization config: {what} {value!r} is not implemented", known=[str(k) for k in known])


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse settings that nobody reads, since they may change the arithmetic; null, false and empty ones pass."""
    unknown = sorted(k for k, v in config.items() if k not in known and v not in (None, False, {}, [], ""))
    if unknown:
        raise CheckpointError(f"{where} has settings that are not implemented: {', '.join(unknown)}",
                              found=", ".join(f"{k} = {config[k]!r}"[:80] for k in unknown), known=sorted(known),
                              fix=did_you_mean(unknown[0], known))


def name_list(value: Any, where: str) -> list[str]:
    """A list of layer names or patterns; null is none. Raises CheckpointError for anything else."""
    if value is None:
        return []
    if not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise CheckpointError(f"quantization config: {where} must be a list of names", found=repr(value))
    return list(value)


def check_scale(scale: Tensor, name: str, shape: LayerShape) -> None:
    """Refuse a scale that cannot be meant: zero, infinite or NaN. Raises CheckpointError."""
    wrong = (~torch.isfinite(scale)) | (scale == 0)
    if bool(wrong.any()):
        raise CheckpointError(f"{'+'.join(part.name for part in shape.parts)}: {name} holds values that are no scale",
                              found=f"{int(wrong.sum())} of {scale.numel()} are zero, infinite or NaN, "
                                    f"such as {scale[wrong][0].item()}",
                              fix="the file is damaged, or its writer failed: fetch or quantize the model again")
