"""Round a layer's input to the codes that its format's product sees, exactly as the quantizers' own tools do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Activation

FP8_MAX = 448.0
# compressed-tensors spreads the range -128..127 evenly around zero: the largest value gets code 127.5, cut to 127.
INT8_MAX = 127.5
# The smallest scale that compressed-tensors measures; an input of zeros would otherwise be divided by zero.
SCALE_MIN = torch.finfo(torch.float32).eps


def quantize(x: Tensor, activation: Activation, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K] (float8_e4m3fn or int8) and float32 scales [..., G]; arithmetic is in float32.

    G is 1 for a scale per token and for a static one (`static_scale`, one value, the checkpoint's), ceil(K / group)
    for groups: they lie along K and the last may be short. A NaN or infinity never becomes a number: the scale of its
    token or group is NaN.
    """
    values, columns = x.float(), x.shape[-1]
    if activation.group:
        short = -columns % activation.group
        values = torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, activation.group))
    if activation.static:
        assert static_scale is not None
        scale = static_scale.float().expand(*values.shape[:-1], 1)
    else:
        largest = FP8_MAX if activation.dtype == "fp8_e4m3" else INT8_MAX
        # Divided by a tensor: by a number, CUDA would multiply by its rounded inverse.
        peak = values.abs().amax(dim=-1, keepdim=True)
        scale = (peak / torch.full_like(peak, largest)).clamp(min=SCALE_MIN)
    codes = _round(values / scale, activation)
    scale = torch.where(values.isfinite().all(dim=-1, keepdim=True), scale, torch.nan)
    if activation.group:
        codes, scale = codes.flatten(-2)[..., :columns].contiguous(), scale.squeeze(-1)
    return codes, scale


def _round(values: Tensor, activation: Activation) -> Tensor:
    if activation.dtype == "fp8_e4m3":
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.round().clamp(-128, 127).nan_to_num(0.0).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, activation: Activation) -> Tensor:
    """What `quantize` gave, multiplied out: float32 [..., K]."""
    if activation.group:
        scale = scale.repeat_interleave(activation.group, dim=-1)[..., : codes.shape[-1]]
    return codes.float() * scale


def fake_quantize(x: Tensor, activation: Activation, static_scale: Tensor | None = None) -> Tensor:
    """x rounded to 8-bit codes and multiplied back, in x's dtype. Arguments and NaN as for `quantize`."""
    codes, scale = quantize(x, activation, static_scale)
    largest = torch.finfo(x.dtype).max  # int8 code -128 times its scale lies beyond the value that it came from
    return dequantize(codes, scale, activation).clamp(-largest, largest).to(x.dtype)
