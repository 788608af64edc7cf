"""AWQ in its gemm layout: 4-bit codes and zero points packed along the outputs, interleaved, scales by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Scheme
from ..plugins.errors import CheckpointError
from .base import CodedMethod, Found, LayerShape, LinearMethod, QuantizationConfig, Weights, WeightSpec
from .evidence import check_scale, contradiction
from .rules import Rule, first_match, substring_rules
from .words import check_groups, check_stored, group_size, is_packed, one_of, setting, unpack

BITS = 4
PACK = 8  # outputs in a word
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where output 8c + j lies in word c


@dataclass(frozen=True, kw_only=True)
class AWQMethod(CodedMethod):
    """W[n, k] = (q[k, n] - z[g, n]) * scales[g, n], g = k // group.

    Codes q are `qweight` [K, N / 8] and zeros z are `qzeros` [G, N / 8], both int32 with outputs in the order
    `NIBBLE`. Layout: AutoAWQ's WQLinear_GEMM; algorithm: Lin et al., arXiv:2306.00978.

    Attributes:
        group: inputs that share a scale; None: all.
        scales: type of the scales.
    """

    group: int | None
    scales: torch.dtype = torch.float16

    @property
    def scheme(self) -> Scheme:
        return Scheme(code="uint", bits=BITS, group=self.group, zero_point=True)

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        inputs, out = shape.in_features, shape.out_features
        groups = 1 if self.group is None else inputs // self.group
        return {
            "qweight": WeightSpec(shape=(inputs, out // PACK), dtype=torch.int32, out_dim=1, out_per=PACK),
            "qzeros": WeightSpec(shape=(groups, out // PACK), dtype=torch.int32, out_dim=1, out_per=PACK),
            "scales": WeightSpec(shape=(groups, out), dtype=self.scales, out_dim=1),
        }

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        check_scale(weights["scales"], "scales", shape)
        return weights

    def matrix(self, weights: Weights) -> QuantizedMatrix:
        qweight, scales = weights["qweight"], weights["scales"]
        inputs, outputs = qweight.shape[0], scales.shape[1]
        return QuantizedMatrix(
            scheme=self.scheme, rows=outputs, columns=inputs,
            codes=lambda start, stop: _outputs(qweight, start, stop).to(torch.uint8),
            scales=scales.T, zeros=_outputs(weights["qzeros"], 0, outputs).to(torch.uint8),
        )


def _outputs(words: Tensor, start: int, stop: int) -> Tensor:
    """Words [R, N / 8] -> codes of outputs [start, stop), [stop - start, R] int32, in natural order."""
    first = start // PACK
    codes = unpack(words[:, first : -(-stop // PACK)].T, BITS).unflatten(0, (-1, PACK))
    return codes[:, list(NIBBLE)].flatten(0, 1)[start - first * PACK : stop - first * PACK]


@dataclass(frozen=True, kw_only=True)
class AWQConfig(QuantizationConfig):
    """An AWQ checkpoint's config, in AutoAWQ's spelling and the older one (`w_bit`, `q_group_size`).

    Attributes:
        group_size: None: whole rows.
        skip: modules left in floating point, by parts of their names.
        lm_head: the head is quantized too; read only when weights are made up.
    """

    group_size: int | None
    skip: tuple[Rule, ...] = ()
    lm_head: bool = False

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> AWQConfig:
        for name in ("version", "checkpoint_format", "format"):
            one_of(name, setting(config, [name], str, "gemm").lower(), ["gemm"])
        one_of("bits", setting(config, ["bits", "w_bit"], int), [BITS])
        one_of("zero_point", setting(config, ["zero_point"], bool, True), [True])
        one_of("pack_dtype", setting(config, ["pack_dtype"], str, "int32"), ["int32"])
        return cls(
            group_size=group_size(config, "group_size", "q_group_size"),
            skip=substring_rules(setting(config, ["modules_to_not_convert"], list, None)),
            lm_head=setting(config, ["lm_head"], bool, False),
        )

    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        rule = first_match(self.skip, layer_name)
        expected = self.lm_head or layer_name.rpartition(".")[2] != "lm_head"
        if not is_packed(layer_name, found, expected=expected, skip=rule.pattern if rule else None):
            return None
        group = None if self.group_size == shape.in_features else self.group_size
        check_divisible(layer_name, shape, group)
        if found is None:
            return AWQMethod(group=group)
        check_codes(layer_name, shape, found)
        scales = check_stored(layer_name, found, ["scales", "qzeros"])
        check_groups(layer_name, shape.in_features, self.group_size, found)
        return AWQMethod(group=group, scales=scales)


def check_divisible(name: str, shape: LayerShape, group: int | None) -> None:
    """Raises CheckpointError when outputs do not fill words or inputs do not fill groups."""
    if shape.out_features % PACK:
        raise CheckpointError(f"{name}: AWQ packs {PACK} outputs together", found=f"{shape.out_features} outputs",
                              fix="leave this module unquantized (modules_to_not_convert)")
    if group is not None and shape.in_features % group:
        raise CheckpointError(f"{name}: AWQ needs whole groups of {group} inputs", found=f"{shape.in_features} inputs",
                              fix="quantize with a group_size that divides it, or leave this module unquantized")


def check_codes(name: str, shape: LayerShape, found: Found) -> None:
    """Raises CheckpointError, with both readings, when qweight is not [K, N / 8]."""
    inputs, out, stored = shape.in_features, shape.out_features, found["qweight"].shape
    if stored == (inputs, out // PACK):
        return
    gptq = len(stored) == 2 and stored[1] == out and stored[0] < inputs
    raise contradiction(name, f"AWQ (gemm), so qweight {[inputs, out // PACK]}", found,
                        f"the stored one fits {'GPTQ' if gptq else 'no AWQ of this size'}: correct quantization_config")
