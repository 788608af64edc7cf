"""Scheme: a weight format as data. What kernels match on, so that a new method finds them without a table edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CodeType = Literal["uint", "int8", "fp8_e4m3"] | str
ActType = Literal["fp8_e4m3", "int8"]
ActScale = Literal["tensor", "token", "group"]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """How a layer's input is quantized before the product.

    `scale` says what shares a scale: the whole tensor (static: the checkpoint's `input_scale`; dynamic: measured), one
    token, or `group` values of a token.
    """

    dtype: ActType
    scale: ActScale
    static: bool = False
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store a matrix W [N, K]: W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], g = k // group.

    Attributes:
        code: "uint" codes of `bits` bits, "int8" or "fp8_e4m3" (then there is no zero); a plugin's own codes have a
            name that only its kernels know.
        bits: width of a code: 2, 3, 4 or 8.
        group: how many values along K share a scale; None: the whole row.
        group_rows: how many rows share it: 1, or the height of a block.
        zero_point: zeros are stored; without, an unsigned code's zero is 2^(bits - 1).
        act_order: columns are stored sorted by group, and the input must be permuted alike.
        activation: None keeps the input in floating point.
    """

    code: CodeType
    bits: int
    group: int | None = None
    group_rows: int = 1
    zero_point: bool = False
    act_order: bool = False
    activation: Activation | None = None

    def __str__(self) -> str:
        weight = {"uint": f"int{self.bits}", "fp8_e4m3": "fp8"}.get(self.code, self.code)
        group = f" g{self.group}" if self.group else ""
        if self.group_rows > 1:
            group = f" blocks {self.group_rows}x{self.group}"
        zero = " zp" if self.zero_point else ""
        order = " act-order" if self.act_order else ""
        act = ""
        if self.activation is not None:
            a = self.activation
            act = f", input {a.dtype} per {a.scale}{a.group or ''} {'static' if a.static else 'dynamic'}"
        return f"{weight}{group}{zero}{order}{act}"
