"""PackedMethod: compressed-tensors' `pack-quantized` integers, several codes to a 32-bit word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Scheme
from ..plugins.errors import CheckpointError
from .base import FLOAT_SOURCES, CodedMethod, Found, LayerShape, Weights, WeightSpec
from .evidence import check_scale, contradiction


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of `bits` bits from int32 words [..., W], low bits first: uint8 [..., count], padding cut off."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class PackedMethod(CodedMethod):
    """W[n, k] = (q[n, k] - z[n, g]) * scale[n, g]; codes and zeros are stored with 2^(bits - 1) added.

    In memory after loading: `weight_packed` int32 [N, ceil(K / pack)], as stored; `weight_scale` float32 [N, G];
    `weight_zero_point` uint8 [N, G] if asymmetric; `weight_g_idx` int32 [K], the group of each column.

    Attributes:
        group: columns that share a scale; None: the whole row.
        per_tensor: one scale for the whole matrix.
        zero_point: zeros are stored, packed along N.
        act_order: `weight_g_idx` is stored, and columns of a group lie scattered.
        shaped: `weight_shape` is stored, and checked.
    """

    bits: int
    group: int | None = None
    per_tensor: bool = False
    zero_point: bool = False
    act_order: bool = False
    shaped: bool = True

    @property
    def pack(self) -> int:
        return 32 // self.bits

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        out, columns, parts = shape.out_features, shape.in_features, len(shape.parts)
        groups = 1 if self.group is None else -(-columns // self.group)
        specs = {
            "weight_packed": WeightSpec(shape=(out, -(-columns // self.pack)), dtype=torch.int32),
            "weight_scale": WeightSpec(shape=(parts, 1) if self.per_tensor else (out, groups), dtype=torch.float32,
                                       sources=FLOAT_SOURCES, per_part=self.per_tensor),
        }
        if self.zero_point:
            words = sum(-(-part.size // self.pack) for part in shape.parts)
            specs["weight_zero_point"] = WeightSpec(shape=(words, groups), dtype=torch.int32, out_per=self.pack)
        if self.act_order:
            specs["weight_g_idx"] = WeightSpec(shape=(columns,), dtype=torch.int32, out_dim=None)
        if self.shaped:
            specs["weight_shape"] = WeightSpec(shape=(parts, 2), dtype=torch.int64, per_part=True,
                                               sources=(torch.int64, torch.int32))
        return specs

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        if self.shaped:
            _check_shape(weights["weight_shape"], shape)
        scale = weights["weight_scale"]
        check_scale(scale, "weight_scale", shape)
        if self.per_tensor:
            sizes = torch.tensor([part.size for part in shape.parts], device=scale.device)
            scale = scale.repeat_interleave(sizes, dim=0)
        loaded = {"weight_packed": weights["weight_packed"], "weight_scale": scale,
                  "weight_g_idx": self._groups(weights, shape, scale.shape[1])}
        if self.zero_point:
            loaded["weight_zero_point"] = self._zeros(weights["weight_zero_point"], shape)
        return loaded

    def _groups(self, weights: Weights, shape: LayerShape, groups: int) -> Tensor:
        stored = weights.get("weight_g_idx")
        # A tool that planned an act-order and made none leaves its index at -1.
        if stored is None or bool((stored == -1).all()):
            columns = torch.arange(shape.in_features, dtype=torch.int32, device=weights["weight_packed"].device)
            return columns // (self.group or shape.in_features)
        low, high = int(stored.min()), int(stored.max())
        if low < 0 or high >= groups:
            raise CheckpointError(f"{shape.parts[0].name}: weight_g_idx names groups that do not exist",
                                  found=f"{low} to {high}", known=[f"0 to {groups - 1}"])
        return stored

    def _zeros(self, words: Tensor, shape: LayerShape) -> Tensor:
        """Each part's zeros begin in a word of their own."""
        counts = [-(-part.size // self.pack) for part in shape.parts]
        pieces = zip(words.split(counts), shape.parts)
        return torch.cat([unpack(piece.T, self.bits, part.size).T for piece, part in pieces]).contiguous()

    def matrix(self, weights: Weights) -> QuantizedMatrix:
        packed, index = weights["weight_packed"], weights["weight_g_idx"]
        return QuantizedMatrix(
            scheme=self.scheme, rows=packed.shape[0], columns=len(index),
            codes=lambda start, stop: unpack(packed[start:stop], self.bits, len(index)),
            scales=weights["weight_scale"], zeros=weights.get("weight_zero_point"),
            groups=index if self.act_order else None,
        )

    @property
    def scheme(self) -> Scheme:
        return Scheme(code="uint", bits=self.bits, group=self.group, zero_point=self.zero_point,
                      act_order=self.act_order)

    @property
    def fusable(self) -> bool:
        """Each part with an act-order has its own."""
        return not self.act_order


def _check_shape(stored: Tensor, shape: LayerShape) -> None:
    for part, size in zip(shape.parts, stored.tolist()):
        if size != [part.size, shape.in_features]:
            raise CheckpointError(f"{part.name}: weight_shape is not the shape that the model declares",
                                  found=f"config: {[part.size, shape.in_features]}; stored: {size}")


def read_packed(layer: str, shape: LayerShape, found: Found, *, bits: int, per: str,
                group: int | None, symmetric: bool, act_order: bool) -> PackedMethod:
    """The method of a stored packed matrix. Raises CheckpointError, with both readings, on a contradiction."""
    method = PackedMethod(bits=bits, group=group, per_tensor=per == "tensor", zero_point=not symmetric,
                          act_order=act_order, shaped="weight_shape" in found)
    specs = method.specs(shape, torch.float32)
    optional = {"weight_zero_point", "weight_g_idx"}
    for name in sorted(specs.keys() | (optional & found.keys())):
        wanted = specs.get(name)
        shapes = wanted and (wanted.shape[1:] if wanted.per_part else wanted.shape)
        if wanted is None or name not in found or found[name].shape != shapes:
            expected = "none" if wanted is None else f"{list(shapes or ())}"
            kind = "symmetric" if symmetric else "asymmetric"
            order = "with" if act_order else "without"
            raise contradiction(layer, f"{kind} int{bits} per {per}{f' of {group}' if group else ''} {order} g_idx, "
                                       f"so {name} {expected}", found)
    return method
