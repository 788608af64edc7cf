"""NF4: 4-bit codes into 16 quantiles of a normal distribution, one absolute maximum for every 64 inputs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.plugins.errors import CheckpointError
from nybble.quant import Found, LayerShape, LinearMethod, QuantizationConfig, TiledMethod, Weights, WeightSpec

BLOCK = 64
# Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


@dataclass(frozen=True)
class NF4Method(TiledMethod):
    """W[n, k] = LEVELS[code[n, k]] * absmax[n, k // 64].

    `weight` uint8 [N, K / 2] holds two codes a byte, the first of them in the high half, as bitsandbytes does;
    `absmax` is float32 [N, K / 64].
    """

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        rows, columns = shape.out_features, shape.in_features
        return {
            "weight": WeightSpec(shape=(rows, columns // 2), dtype=torch.uint8),
            "absmax": WeightSpec(shape=(rows, columns // BLOCK), dtype=torch.float32),
        }

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        check_finite(weights["absmax"], "+".join(part.name for part in shape.parts))
        levels = torch.tensor(LEVELS, device=weights["absmax"].device)
        return {**weights, "pairs": torch.cartesian_prod(levels, levels)}  # a byte -> its two levels

    def rows(self, weights: Weights) -> int:
        return weights["weight"].shape[0]

    def dequant_rows(self, weights: Weights, start: int, stop: int) -> Tensor:
        levels = weights["pairs"][weights["weight"][start:stop].int()].flatten(1)
        return (levels.unflatten(1, (-1, BLOCK)) * weights["absmax"][start:stop, :, None]).flatten(1)


class NF4Config(QuantizationConfig):
    """{"quant_method": "nf4", "block_size": 64}."""

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> NF4Config:
        wrong = {k: v for k, v in config.items() if {"quant_method": "nf4", "block_size": BLOCK}.get(k) != v}
        if wrong:
            raise CheckpointError("quantization config: nf4 implements no such settings", found=wrong,
                                  known=['"quant_method": "nf4"', f'"block_size": {BLOCK}'])
        return cls()

    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        whole = shape.in_features % BLOCK == 0
        if found is None:
            return NF4Method() if whole and layer_name != "lm_head" else None
        if "weight" not in found or found["weight"].dtype != torch.uint8:
            return None
        if not whole:
            raise CheckpointError(f"{layer_name}: NF4 needs whole blocks of {BLOCK} inputs", found=shape.in_features)
        return NF4Method()


def quantize(weight: Tensor, name: str = "weight") -> Weights:
    """The nearest NF4 matrix to `weight` [N, K], K a multiple of 64, as `NF4Method` stores it."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    absmax = blocks.abs().amax(2)
    check_finite(absmax, name)
    levels = torch.tensor(LEVELS, device=weight.device)
    halfway = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / absmax.masked_fill(absmax == 0, 1)[..., None], halfway, out_int32=True)
    first, second = codes.flatten(1).unflatten(1, (-1, 2)).unbind(2)
    return {"weight": (first * 16 + second).to(torch.uint8), "absmax": absmax}


def check_finite(absmax: Tensor, name: str) -> None:
    """Raises CheckpointError for a block that cannot be meant: infinite or NaN."""
    bad = int((~absmax.isfinite()).sum())
    if bad:
        raise CheckpointError(f"{name}: {bad} of {absmax.numel()} blocks hold values that are infinite or NaN",
                              fix="the file is damaged, or its writer failed: fetch it again")
