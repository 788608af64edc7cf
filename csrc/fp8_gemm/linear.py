"""CutlassFp8Kernel: FP8 weights with scales by tensor or channel times FP8 inputs, on Hopper by CUTLASS."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..launch import missing, multiprocessors
from ..matrix import QuantizedMatrix
from ..ops import load_op, op_missing, optional_op
from ..quantize import Quantized, Rounding, triton_quantize
from ..scheme import Scheme
from ..select import LinearKernel, Problem
from .many_rows import MANY_TOKENS, fits, multiply

HOPPER = (9, 0)
# TMA moves rows of 16 bytes: K one-byte codes in, N two-byte values out.
K_MULTIPLE, N_MULTIPLE = 16, 8
BY_SHAPE = -1
FEW_ROWS = 8
"""Tokens up to which reading the weights is all that takes time, and a kernel made for that is used."""
ROUNDED_BYTES, VECTOR = 40960, 16
"""Most bytes of codes that it makes of tokens that come in 16 bits, and the alignment of those."""


class CutlassFp8Kernel(LinearKernel):
    """Scales are applied to float32 sums, in the epilogue, with the bias. The tile follows the number of tokens.

    A few tokens have a kernel of their own (csrc/fp8_gemm/few_rows.cu), where it is built, and many are torch's, where
    it multiplies by such weights (csrc/fp8_gemm/many_rows.py).
    """

    name: ClassVar[str] = "cutlass_fp8"
    priority: ClassVar[int] = 20

    @classmethod
    def supports(cls, problem: Problem) -> str | None:
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"gives 16-bit outputs, not {str(problem.dtype).removeprefix('torch.')}"
        if problem.scheme.act_order or not problem.even:
            return "inputs must be in order"
        return (scheme_refusal(problem.scheme) or shape_refusal(problem.rows, problem.columns)
                or cutlass_missing("fp8_gemm", problem.device))

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        assert matrix.scheme.activation is not None
        self.rows, self.columns, self.activation = matrix.rows, matrix.columns, matrix.scheme.activation
        self.weights = {"codes": matrix.codes(0, matrix.rows).contiguous(), "scales": channel_scales(matrix)}
        if matrix.input_scale is not None:
            self.weights["input_scale"] = matrix.input_scale.float()
        self.rounding = Rounding(self.activation, self.weights.get("input_scale"))
        self.multiprocessors = multiprocessors(matrix.scales.device)
        self.many_rows = fits(matrix.rows, dtype, matrix.scales.device)
        self.gemm = load_op("fp8_gemm")
        self.few_rows = optional_op("fp8_few_rows", matrix.scales.device)
        self.few_rows_rounding = optional_op("fp8_few_rows_rounding", matrix.scales.device)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, self.columns).contiguous()
        if self.few_rows_rounding is not None and self._rounds_itself(rows):
            out = rows.new_empty(len(rows), self.rows)
            self.few_rows_rounding(out, rows, self.weights["codes"], self.weights.get("input_scale"),
                                   self.weights["scales"], bias)
            return out.view(*x.shape[:-1], self.rows)
        codes, scales = triton_quantize(rows, self.activation, self.weights.get("input_scale"))
        out = self.run_rounded(Quantized(codes=codes, scales=scales, dtype=x.dtype), bias)
        return out.view(*x.shape[:-1], self.rows)

    def _rounds_itself(self, rows: Tensor) -> bool:
        """Whether the kernel for a few tokens takes these as they are: every block of it then rounds all of them."""
        stride = -(-self.columns // 128) * 128 + 64
        return (len(rows) <= FEW_ROWS and len(rows) * stride <= ROUNDED_BYTES and rows.data_ptr() % VECTOR == 0)

    def run_rounded(self, x: Quantized, bias: Tensor | None = None) -> Tensor:
        weights = self.weights
        if self.many_rows and len(x.codes) >= MANY_TOKENS:
            return multiply(x, weights["codes"], weights["scales"], bias)
        out = x.codes.new_empty(len(x.codes), self.rows, dtype=x.dtype)
        if self.few_rows is not None and len(x.codes) <= FEW_ROWS:
            self.few_rows(out, x.codes, weights["codes"], x.scales, weights["scales"], bias)
            return out
        self.gemm(out, x.codes, weights["codes"], x.scales, weights["scales"], bias, BY_SHAPE, self.multiprocessors)
        return out


def scheme_refusal(scheme: Scheme) -> str | None:
    """Why CUTLASS's FP8 products cannot use a format; None when they can."""
    activation = scheme.activation
    if scheme.code != "fp8_e4m3" or activation is None or activation.dtype != "fp8_e4m3":
        return "multiplies FP8 weights by FP8 inputs"
    if scheme.group is not None or activation.group is not None:
        return "scales a whole row: by tensor, channel or token, not by group or block"
    return None


def shape_refusal(rows: int, columns: int) -> str | None:
    """Why they cannot multiply by a matrix [rows, columns]; None when they can."""
    if columns % K_MULTIPLE or columns == 0:
        return f"needs a multiple of {K_MULTIPLE} inputs, not {columns}"
    if rows % N_MULTIPLE or rows == 0:
        return f"needs a multiple of {N_MULTIPLE} outputs, not {rows}"
    return None


def cutlass_missing(op: str, device: torch.device) -> str | None:
    """Why an op of the CUTLASS library, or Triton, which rounds its inputs, cannot run on a device; None if it can."""
    if (reason := missing(device, HOPPER)) is not None:
        return reason
    if (found := torch.cuda.get_device_capability(device)) != HOPPER:
        return f"is built for compute capability 9.0 alone, this device has {found[0]}.{found[1]}"
    return op_missing(op, device)


def channel_scales(matrix: QuantizedMatrix) -> Tensor:
    """The scale of every row, [N] float32, however rows share them."""
    scales = matrix.scales[:, 0].float()
    return (scales.expand(matrix.rows) if matrix.scale_rows is None else scales[matrix.scale_rows.long()]).contiguous()
