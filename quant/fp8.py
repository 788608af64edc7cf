"""Fp8Config: `quant_method: "fp8"` of AutoFP8, DeepSeek and transformers' fine-grained FP8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..csrc.scheme import Activation
from ..plugins.errors import CheckpointError
from .base import FLOAT_SOURCES, Found, LayerShape, LinearMethod, QuantizationConfig
from .evidence import check_plain, contradiction, name_list, refuse_unknown, unsupported
from .online import OnlineFp8Method
from .rules import Rule, exact_rules, first_match
from .scaled import ScaledMethod, assume_scaled, read_scaled

KNOWN = frozenset(
    """quant_method activation_scheme ignored_layers modules_to_not_convert weight_block_size fmt scale_fmt
    kv_cache_scheme dequantize expert_dtype""".split()
)


@dataclass(frozen=True, kw_only=True)
class Fp8Config(QuantizationConfig):
    """FP8 (E4M3) weights with scales per tensor, per channel or per block.

    Attributes:
        quantize: the checkpoint is in floating point and is quantized while it is loaded: every matrix but the head.
        ignored: layers left in floating point; asked only when there is no stored dtype to go by.
        block: `weight_block_size`, or None.
        activation: how inputs are rounded; None leaves them as they are. A dynamic input is rounded per token also
            where AutoFP8 takes one scale for a whole batch, or results would depend on who else is in the batch.
    """

    quantize: bool = False
    ignored: tuple[Rule, ...] = ()
    block: tuple[int, int] | None = None
    activation: Activation | None = None

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> Fp8Config:
        refuse_unknown(config, KNOWN, "quantization config of fp8")
        for name, known in (("fmt", ["e4m3"]), ("scale_fmt", ["float", "ue8m0"]), ("expert_dtype", ["fp8"])):
            if config.get(name) not in (None, *known):
                raise unsupported(name, config[name], known)
        keys = ("ignored_layers", "modules_to_not_convert")
        names = [name for key in keys for name in name_list(config.get(key), key)]
        block = _block(config.get("weight_block_size"))
        return cls(ignored=exact_rules(names), block=block,
                   activation=_activation(config.get("activation_scheme"), block))

    @classmethod
    def online(cls) -> Fp8Config:
        return cls(quantize=True)

    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        if self.quantize:
            return None if layer_name.rpartition(".")[2] == "lm_head" else OnlineFp8Method.per_channel()
        if found is None:
            return None if first_match(self.ignored, layer_name) else self._assumed()
        if "weight" not in found or found["weight"].dtype in FLOAT_SOURCES:
            check_plain(layer_name, "an FP8 or a plain weight", found)
            return None
        if found["weight"].dtype != torch.float8_e4m3fn:
            raise contradiction(layer_name, "FP8 weights, of which float8_e4m3fn is implemented", found,
                                fix="use a checkpoint with E4M3 (FN) weights")
        says = "FP8 weights" + (f" in blocks of {list(self.block)}" if self.block else "")
        return read_scaled(layer_name, shape, found, says=says, code="fp8_e4m3", per="block" if self.block else None,
                           block=self.block, activation=self.activation)

    def _assumed(self) -> ScaledMethod:
        if self.block is None:
            return assume_scaled(code="fp8_e4m3", per="tensor", activation=self.activation)
        return assume_scaled(code="fp8_e4m3", per="block", block=self.block, name="weight_scale_inv",
                             activation=self.activation)

    @property
    def ignored_tensors(self) -> Mapping[str, str]:
        """transformers writes block scales also beside matrices that it left in 16 bits."""
        return {r"(.*\.)?weight_scale_inv": "its weight is stored in floating point"}


def _block(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError("quantization config: weight_block_size must be two positive integers", found=size)
    return size[0], size[1]


def _activation(scheme: Any, block: tuple[int, int] | None) -> Activation | None:
    known = [None, "dynamic"] if block else [None, "dynamic", "static"]
    if scheme not in known:
        raise unsupported("with weight_block_size, activation_scheme" if block else "activation_scheme", scheme, known)
    if scheme is None:
        return None
    if scheme == "static":
        return Activation(dtype="fp8_e4m3", scale="tensor", static=True)
    if block is None:
        return Activation(dtype="fp8_e4m3", scale="token")
    return Activation(dtype="fp8_e4m3", scale="group", group=block[1])
