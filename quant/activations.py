"""Round a layer's input to the codes that its format's product sees, exactly as the quantizers' own tools do."""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Activation

FP8_MAX = 448.0
# compressed-tensors spreads the range -128..127 evenly around zero: the largest value gets code 127.5, cut to 127.
INT8_MAX = 127.5
# The smallest scale that compressed-tensors measures; an input of zeros would otherwise be divided by zero.
SCALE_MIN = torch.finfo(torch.float32).eps


def fake_quantize(x: Tensor, activation: Activation, static_scale: Tensor | None = None) -> Tensor:
    """x rounded to 8-bit codes and multiplied back, in x's dtype; all arithmetic is in float32.

    Args:
        x: [..., K].
        activation: what shares a scale. Groups lie along K; the last one may be short.
        static_scale: the checkpoint's scale, one float32 value, if the activation is static; else scales are measured.

    NaN and infinity come out as NaN, never as a number.
    """
    values = x.float()
    if activation.static:
        assert static_scale is not None
        return _round(values, static_scale, activation).to(x.dtype)
    columns = values.shape[-1]
    if activation.group:
        short = -columns % activation.group
        values = torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, activation.group))
    largest = FP8_MAX if activation.dtype == "fp8_e4m3" else INT8_MAX
    scale = (values.abs().amax(dim=-1, keepdim=True) / largest).clamp(min=SCALE_MIN)
    values = _round(values, scale, activation)
    if activation.group:
        values = values.flatten(-2)[..., :columns]
    return values.to(x.dtype)


def _round(values: Tensor, scale: Tensor, activation: Activation) -> Tensor:
    codes = values / scale
    if activation.dtype == "fp8_e4m3":
        return codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return codes.round().clamp(-128, 127) * scale
