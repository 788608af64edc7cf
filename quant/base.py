"""The contract of a quantization method: shapes in, named tensors described, a stateless `apply`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.quantize import fake_quantize
from ..csrc.scheme import Scheme
from ..plugins.errors import UsageError

Weights = Mapping[str, Tensor]

REFERENCE = "reference"

# Rows dequantized at a time: a tile of a 4096-wide matrix in float32 is 4 MiB and stays in a processor's cache.
TILE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """One checkpoint matrix inside a fused layer: its name beside the layer's siblings and its output size."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A linear layer y = x W^T + b as the model declares it: W is [sum of part sizes, in_features].

    The parts are the model's own declaration of what is fused; nothing else in the project knows that q, k and v
    are one matrix.
    """

    in_features: int
    parts: tuple[Part, ...]
    bias: bool = False

    @property
    def out_features(self) -> int:
        return sum(p.size for p in self.parts)


class Stored(NamedTuple):
    """A tensor as a checkpoint's header describes it."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


Found = Mapping[str, Stored]
"""The stored tensors of one module by the last part of their names: {"qweight": Stored(torch.int32, (32, 256))}."""


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One stored tensor of a layer.

    Attributes:
        shape, dtype: of the whole fused tensor in memory.
        out_dim: dimension along which the parts of a fused layer are stacked; None when all parts share the tensor.
        out_per: output features that one element along `out_dim` stands for (packing, blocks); a part's last element
            may stand for fewer.
        per_part: dimension 0 counts the parts, and each part's tensor is one entry of it; excludes `out_dim`.
        sources: dtypes a checkpoint may store it in; empty means exactly `dtype`.
        fill: puts rows of the checkpoint's tensor into the layer's weights itself, from a row of the fused matrix on;
            None copies them. For methods that quantize while loading.
        stored: whether the checkpoint has it; else `fill` of another tensor makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None = 0
    out_per: int = 1
    per_part: bool = False
    sources: tuple[torch.dtype, ...] = ()
    fill: Callable[[Weights, int, Tensor], None] | None = None
    stored: bool = True


FLOAT_SOURCES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """A place in memory that one checkpoint tensor fills: the unit of the loader's ledger.

    Attributes:
        name: the tensor's full name in the checkpoint.
        target: view to copy into; its shape is the shape the checkpoint must have.
        sources: dtypes accepted from the checkpoint; values are converted to the target's.
        optional: may be absent; `target` then keeps the value its owner declared as default.
        alias: `target` belongs to another slot (tied weights): if the file stores this name too, it must hold equal
            values. Implies optional.
        fill: puts rows into place from a row on, instead of a copy into `target`.
    """

    name: str
    target: Tensor
    sources: tuple[torch.dtype, ...] = FLOAT_SOURCES
    optional: bool = False
    alias: bool = False
    fill: Callable[[int, Tensor], None] | None = None

    def put(self, row: int, values: Tensor) -> None:
        """Store `values`, rows [row, row + len(values)) of the checkpoint's tensor (a scalar is one row)."""
        if self.fill is not None:
            self.fill(row, values)
        else:
            target = self.target.view(1) if self.target.ndim == 0 else self.target
            target.narrow(0, row, len(values)).copy_(values)


def part_slots(prefix: str, shape: LayerShape, specs: Mapping[str, WeightSpec], weights: Weights) -> Iterator[Slot]:
    """The slots of a linear layer whose parts live beside each other under `prefix`.

    `prefix` "model.layers.0.self_attn" and part "q_proj" give "model.layers.0.self_attn.q_proj.weight", a view of
    the rows of the fused tensor that belong to q.
    """
    for name, spec in specs.items():
        if not spec.stored:
            continue
        start = 0
        for i, part in enumerate(shape.parts):
            target = weights[name]
            fill = None if spec.fill is None else _filler(spec.fill, weights, start)
            if spec.per_part:
                target = target[i]
            elif spec.out_dim is not None:
                rows = -(-part.size // spec.out_per)
                target = target.narrow(spec.out_dim, start, rows)
                start += rows
            full = f"{prefix}.{part.name}.{name}" if prefix else f"{part.name}.{name}"
            yield Slot(name=full, target=target, sources=spec.sources or (spec.dtype,), fill=fill)


def _filler(fill: Callable[[Weights, int, Tensor], None], weights: Weights,
            start: int) -> Callable[[int, Tensor], None]:
    return lambda row, values: fill(weights, start + row, values)


class LinearMethod(ABC):
    """How one linear layer is stored and multiplied. Stateless: tensors live in the layer, settings in the object.

    Methods are frozen dataclasses: the parts of a fused layer share storage exactly when their methods are equal.
    """

    @abstractmethod
    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        """The tensors the layer keeps, by the last part of their checkpoint name."""

    @abstractmethod
    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""

    @abstractmethod
    def dequant(self, weights: Weights) -> Tensor:
        """The matrix the weights stand for, [out_features, in_features], in float32: the reference."""

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        """Repack and check once every tensor is in place; returns what `apply` and `dequant` will be given.

        Raises CheckpointError for values that cannot be meant, such as a zero or NaN scale.
        """
        return weights

    @property
    def scheme(self) -> Scheme | None:
        """What kernels match on; None for plain weights and for codes that no kernel knows."""
        return None

    def matrix(self, weights: Weights) -> QuantizedMatrix | None:
        """The loaded weights as kernels read them; None leaves the layer to `apply`."""
        return None

    def runs_by(self, weights: Weights) -> str:
        """What the load report calls `apply`."""
        return REFERENCE

    @property
    def plain(self) -> bool:
        """Whether the weights are not quantized at all, so that no kernel need be asked."""
        return False

    @property
    def fusable(self) -> bool:
        """Whether several parts may share one layer (their inputs need the same treatment)."""
        return True


class TiledMethod(LinearMethod):
    """A method that says what some rows stand for; multiplies tile by tile, never holding the whole matrix."""

    @abstractmethod
    def dequant_rows(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the matrix, [stop - start, in_features] in float32."""

    @abstractmethod
    def rows(self, weights: Weights) -> int:
        """out_features."""

    def quantize_input(self, weights: Weights, x: Tensor) -> Tensor:
        """x as the format's product sees it, dequantized again; x itself for weight-only formats."""
        return x

    def dequant(self, weights: Weights) -> Tensor:
        return self.dequant_rows(weights, 0, self.rows(weights))

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.quantize_input(weights, x)
        rows = self.rows(weights)
        out = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, TILE_ROWS):
            stop = min(start + TILE_ROWS, rows)
            tile = self.dequant_rows(weights, start, stop).to(x.dtype)
            out[..., start:stop] = torch.nn.functional.linear(x, tile)
        return out if bias is None else out + bias


class CodedMethod(TiledMethod):
    """A method whose weights are codes with scales: it says where they lie, and kernels do the rest."""

    @abstractmethod
    def matrix(self, weights: Weights) -> QuantizedMatrix: ...

    def dequant_rows(self, weights: Weights, start: int, stop: int) -> Tensor:
        return self.matrix(weights).dequant(start, stop)

    def rows(self, weights: Weights) -> int:
        return self.matrix(weights).rows

    def quantize_input(self, weights: Weights, x: Tensor) -> Tensor:
        matrix = self.matrix(weights)
        activation = matrix.scheme.activation
        return x if activation is None else fake_quantize(x, activation, matrix.input_scale)


class QuantizationConfig(ABC):
    """A checkpoint's quantization, read once; says how each layer is stored."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> QuantizationConfig:
        """Read `quantization_config` of config.json. Raises CheckpointError on what it does not implement."""

    @classmethod
    def online(cls) -> QuantizationConfig:
        """The config that quantizes a floating point checkpoint while it is loaded.

        Raises UsageError: the method has none.
        """
        raise UsageError(f"{cls.__name__} cannot quantize a checkpoint while it is loaded",
                         found="a checkpoint in floating point",
                         fix="leave --quantization out, or quantize the checkpoint with the method's own tool first")

    @abstractmethod
    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        """The method of one checkpoint matrix, or None when it is stored in floating point.

        Args:
            layer_name: its full name, "model.layers.0.self_attn.q_proj".
            shape: of this matrix alone.
            found: what the checkpoint stores of it; None when weights are made up (the config decides alone).

        What is stored decides, the config fills in what cannot be seen. Raises CheckpointError, with both readings,
        when they contradict each other.
        """

    @property
    def ignored_tensors(self) -> Mapping[str, str]:
        """Patterns of stored tensors that the method has no use for -> why (as `CausalLM.ignored_tensors`)."""
        return {}


# oneDNN packs a matrix for a number of rows; for this one every smaller batch is fast as well.
PACK_ROWS = 64


@dataclass(frozen=True)
class Unquantized(LinearMethod):
    """Plain weights: one floating point matrix `weight` [out_features, in_features].

    On CPU in float32 it is kept in oneDNN's packed layout, as `packed`: 1.5 to 5 times as fast as torch's own product
    at 1 to 64 rows of a 32000x512 matrix on two EPYC cores, and the same values when unpacked.
    """

    sources: tuple[torch.dtype, ...] = field(default=FLOAT_SOURCES)

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        out = shape.out_features
        return {"weight": WeightSpec(shape=(out, shape.in_features), dtype=dtype, sources=self.sources)}

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        weight = weights["weight"]
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return {"packed": torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)}
        return weights

    @property
    def plain(self) -> bool:
        return True

    def runs_by(self, weights: Weights) -> str:
        return "onednn" if "packed" in weights else "torch"

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if (packed := weights.get("packed")) is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return torch.nn.functional.linear(x, weights["weight"], bias)

    def dequant(self, weights: Weights) -> Tensor:
        return weights["packed"].to_dense() if "packed" in weights else weights["weight"].float()
