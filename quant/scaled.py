"""ScaledMethod: 8-bit weights (FP8 or INT8), one code each, times the scale of their tensor, row or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Activation, Scheme
from ..plugins.errors import CheckpointError
from .base import FLOAT_SOURCES, CodedMethod, Found, LayerShape, Weights, WeightSpec
from .evidence import check_scale, contradiction

Code = Literal["fp8_e4m3", "int8"]
ScalePer = Literal["tensor", "channel", "block"]

SCALE_NAMES = ("weight_scale", "weight_scale_inv", "scale")
INPUT_SCALE_NAMES = ("input_scale", "activation_scale")
SCALE_SOURCES = (*FLOAT_SOURCES, torch.float8_e8m0fnu)


def code_dtype(code: Code) -> torch.dtype:
    return torch.float8_e4m3fn if code == "fp8_e4m3" else torch.int8


class StoredScale(NamedTuple):
    """How a checkpoint spells a scale: its name, its number of dimensions, and whether it holds bare exponents.

    `exponents`: uint8 values e that mean 2^(e - 127), which is E8M0 without its name.
    """

    name: str
    ndim: int
    exponents: bool = False


@dataclass(frozen=True, kw_only=True)
class ScaledMethod(CodedMethod):
    """W[n, k] = weight[n, k] * scale, whatever the scale is called: `weight_scale_inv` is a multiplier too.

    In memory after loading: `weight` [N, K] in the code's dtype; `weight_scale` float32, [N, 1] for `per` tensor or
    channel, one row per row of blocks [nb, kb] for block, with `scale_rows` int32 [N] naming each row's;
    `input_scale` float32 [] for static inputs. Fused parts so keep their own scales, and blocks start anew with each
    part.

    Attributes:
        block: (rows, columns) that share a scale when `per` is block; the last of either may be short.
        scale, input_scale: as the checkpoint stores them; `input_scale` exactly for a static activation.
        activation: None multiplies the input as it is.
    """

    code: Code
    per: ScalePer
    scale: StoredScale
    block: tuple[int, int] | None = None
    activation: Activation | None = None
    input_scale: StoredScale | None = None

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        weight = WeightSpec(shape=(shape.out_features, shape.in_features), dtype=code_dtype(self.code))
        specs = {"weight": weight, self.scale.name: self._scale_spec(shape)}
        if self.input_scale is not None:
            specs[self.input_scale.name] = _per_part(self.input_scale, shape)
        return specs

    def _scale_spec(self, shape: LayerShape) -> WeightSpec:
        if self.per == "tensor":
            return _per_part(self.scale, shape)
        dtype, sources = _scale_dtypes(self.scale)
        if self.block is None:
            size = (shape.out_features, *(1,) * (self.scale.ndim - 1))
            return WeightSpec(shape=size, dtype=dtype, sources=sources)
        rows, columns = self.block
        size = (sum(-(-part.size // rows) for part in shape.parts), -(-shape.in_features // columns))
        return WeightSpec(shape=size, dtype=dtype, sources=sources, out_per=rows)

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        scale = _values(weights[self.scale.name], self.scale, shape)
        _check_codes(weights["weight"], shape)
        loaded, sizes = {"weight": weights["weight"]}, [part.size for part in shape.parts]
        if self.per == "tensor":
            scale = torch.cat([value.expand(size) for value, size in zip(scale.reshape(-1), sizes, strict=True)])
        if self.block is None:
            loaded["weight_scale"] = scale.reshape(-1, 1)
        else:
            loaded["weight_scale"] = scale
            loaded["scale_rows"] = _block_rows(sizes, self.block[0]).to(scale.device)
        if self.input_scale is not None:
            loaded["input_scale"] = _values(weights[self.input_scale.name], self.input_scale, shape).reshape(())
        return loaded

    def matrix(self, weights: Weights) -> QuantizedMatrix:
        weight = weights["weight"]
        return QuantizedMatrix(
            scheme=self.scheme, rows=weight.shape[0], columns=weight.shape[1],
            codes=lambda start, stop: weight[start:stop], scales=weights["weight_scale"],
            scale_rows=weights.get("scale_rows"), input_scale=weights.get("input_scale"),
        )

    @property
    def scheme(self) -> Scheme:
        rows, group = self.block or (1, None)
        return Scheme(code=self.code, bits=8, group=group, group_rows=rows, activation=self.activation)

    @property
    def fusable(self) -> bool:
        """Static input scales differ between parts, and one input can be rounded in only one way."""
        return self.input_scale is None


def _per_part(scale: StoredScale, shape: LayerShape) -> WeightSpec:
    dtype, sources = _scale_dtypes(scale)
    size = (len(shape.parts), *(1,) * scale.ndim)
    return WeightSpec(shape=size, dtype=dtype, sources=sources, per_part=True)


def _scale_dtypes(scale: StoredScale) -> tuple[torch.dtype, tuple[torch.dtype, ...]]:
    return (torch.uint8, ()) if scale.exponents else (torch.float32, SCALE_SOURCES)


def _values(stored: Tensor, scale: StoredScale, shape: LayerShape) -> Tensor:
    """The scale as float32, checked."""
    values = (stored.view(torch.float8_e8m0fnu) if scale.exponents else stored).float()
    check_scale(values, scale.name, shape)
    return values


def _check_codes(codes: Tensor, shape: LayerShape) -> None:
    """Refuse a matrix with a NaN among its FP8 codes: not every kernel would show it."""
    if codes.dtype != torch.float8_e4m3fn or codes.numel() == 0:
        return
    # one answer: a model has thousands of these, and each waits for the device
    if bool((codes.view(torch.int8).max() == 0x7F) | (codes.view(torch.uint8).max() == 0xFF)):
        raise CheckpointError(f"{'+'.join(part.name for part in shape.parts)}: weight holds NaN",
                              found=f"{int(codes.isnan().sum())} of {codes.numel()} values",
                              fix="the file is damaged, or its writer failed: fetch or quantize the model again")


def _block_rows(sizes: list[int], block: int) -> Tensor:
    """Which row of block scales each row of a fused matrix has: every part starts a new block."""
    rows, first = [], 0
    for size in sizes:
        rows.append(first + torch.arange(size) // block)
        first += -(-size // block)
    return torch.cat(rows).int()


def read_scaled(layer: str, shape: LayerShape, found: Found, *, says: str, code: Code, per: ScalePer | None,
                block: tuple[int, int] | None = None, activation: Activation | None = None) -> ScaledMethod:
    """The method of a stored 8-bit matrix, its scales as the checkpoint spells them.

    Args:
        found: holds `weight` in the code's dtype.
        says: the config's reading, for errors.
        per: None takes tensor or channel, whichever the stored scale is.

    Raises CheckpointError, with both readings, when a scale is missing, double, or of a shape that `per` has not.
    """
    rows, columns = shape.out_features, shape.in_features
    if found["weight"].shape != (rows, columns):
        raise contradiction(layer, f"a matrix [{rows}, {columns}]", found)
    name = _one_of(SCALE_NAMES, layer, says, found)
    stored = found[name]
    shapes: dict[ScalePer, list[tuple[int, ...]]] = {"tensor": [(), (1,), (1, 1)], "channel": [(rows,), (rows, 1)]}
    if block is not None:
        shapes["block"] = [(-(-rows // block[0]), -(-columns // block[1]))]
    fits = [kind for kind, known in shapes.items() if stored.shape in known and kind == (per or kind)]
    exponents = stored.dtype == torch.uint8
    if not fits or not (exponents or stored.dtype in SCALE_SOURCES):
        expected = " or ".join(str(list(s)) for kind, known in shapes.items() if kind == (per or kind) for s in known)
        raise contradiction(layer, f"{says}: a float scale {expected}", found)
    input_scale = None
    if activation is not None and activation.static:
        input_name = _one_of(INPUT_SCALE_NAMES, layer, f"{says}, static input", found)
        if found[input_name].shape not in shapes["tensor"] or found[input_name].dtype not in SCALE_SOURCES:
            raise contradiction(layer, "static input: one float input scale", found)
        input_scale = StoredScale(input_name, len(found[input_name].shape))
    elif any(name in found for name in INPUT_SCALE_NAMES):
        raise contradiction(layer, f"{says}, no static input", found,
                            fix='the file has static input scales: its config should say "static"')
    return ScaledMethod(code=code, per=fits[0], block=block if fits[0] == "block" else None, activation=activation,
                        scale=StoredScale(name, len(stored.shape), exponents), input_scale=input_scale)


def _one_of(names: tuple[str, ...], layer: str, says: str, found: Found) -> str:
    present = [name for name in names if name in found]
    if len(present) != 1:
        raise contradiction(layer, f"{says}: exactly one of {', '.join(names)}", found)
    return present[0]


def assume_scaled(*, code: Code, per: ScalePer, block: tuple[int, int] | None = None, name: str = "weight_scale",
                  activation: Activation | None = None) -> ScaledMethod:
    """The method when weights are made up: as the format's own tool would have written them."""
    static = activation is not None and activation.static
    ndim = {"tensor": 0, "channel": 2, "block": 2}[per]
    return ScaledMethod(code=code, per=per, block=block, activation=activation, scale=StoredScale(name, ndim),
                        input_scale=StoredScale("input_scale", 0) if static else None)
