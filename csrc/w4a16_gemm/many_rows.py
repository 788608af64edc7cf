"""Many tokens times packed codes: the weights of some outputs at a time in 16 bits, for torch's product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..launch import early
from ..matrix import QuantizedMatrix
from .packing import ROWS, PackedCodes

# Measured on an H100 at Llama-3-8B's shapes, us by the kernel that unpacks as it multiplies and by way of scratch: qkv
# 43 and 43 at 128 tokens, 71 and 45 at 256; gate_up 143 and 188, then 226 and 213.
MANY_TOKENS = 256
SCRATCH = 32 << 20
"""Bytes of dequantized weights at a time: they stay in a second-level cache of 50 MB until they are read, and are
enough outputs for a product to fill the device (gate_up at 1024 tokens: 402 us, with 16 MiB 424, with 64 MiB 444)."""
PRODUCT_ROWS = 256  # outputs of the largest tile that products take


@dataclass(frozen=True, kw_only=True)
class Format:
    """How codes lie and what they stand for: inputs of a block, bits of a code, the zero of all codes where none are
    stored, blocks that share a scale (0: all)."""

    block: int
    width: int
    zero: int
    blocks_per_group: int

    @classmethod
    def of(cls, packed: PackedCodes, matrix: QuantizedMatrix) -> Format:
        group = matrix.scheme.group
        return cls(block=packed.block, width=packed.width, zero=matrix.zero - packed.offset,
                   blocks_per_group=0 if group is None else group // packed.block)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, form: Format) -> Tensor:
    """Matrices out [E, N, K], bfloat16 or float16, rows contiguous, from what `PackedCodes` makes of each.

    codes [E, ceil(N / 64), KB, 64, B] int8; scales [E, G, N], zeros [E, G, N] int8 less the codes' offset, with equal
    strides within a matrix. The weights' inputs lie in stored order.
    """
    from .triton_kernel import dequantize_kernel

    (count, rows, columns), (strips, blocks) = out.shape, codes.shape[1:3]
    dequantize_kernel[(blocks, strips, count)](
        codes, scales, codes if zeros is None else zeros, out,
        rows, columns, blocks, scales.stride(1), codes.stride(0), scales.stride(0),
        0 if zeros is None else zeros.stride(0), out.stride(0),
        BLOCKS_PER_GROUP=form.blocks_per_group, WIDTH=form.width, ZERO=form.zero, HAS_ZEROS=zeros is not None,
        BLOCK_K=form.block, num_warps=4, **early(codes.device))
    return out


def multiply(x: Tensor, weights: Mapping[str, Tensor], form: Format, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x [M, K] W^T + bias, W of `weights` as `TritonW4A16Kernel` keeps them, x in stored order.

    Weights are rounded to x's dtype; sums are cuBLAS's, of float32. Where it splits a sum, torch lets it add the parts
    in 16 bits (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`, true by default).
    """
    (rows, columns), codes, zeros = (out.shape[1], x.shape[1]), weights["codes"], weights.get("zeros")
    step = rows_at_once(rows, columns * x.element_size())
    scratch = x.new_empty(step, columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        dense = dequantize(codes[part.start // ROWS : -(-part.stop // ROWS)].unsqueeze(0),
                           weights["scales"][:, part].unsqueeze(0),
                           None if zeros is None else zeros[:, part].unsqueeze(0),
                           scratch[: part.stop - start].unsqueeze(0), form)[0].T
        if bias is None:
            torch.mm(x, dense, out=out[:, part])
        else:
            torch.addmm(bias[part], x, dense, out=out[:, part])


def rows_at_once(rows: int, row_bytes: int) -> int:
    """Outputs of a piece: whole tiles of a product, about as many in each piece, at most SCRATCH bytes or one tile."""
    pieces = -(-rows // max(PRODUCT_ROWS, SCRATCH // row_bytes // PRODUCT_ROWS * PRODUCT_ROWS))
    return -(-rows // (pieces * PRODUCT_ROWS)) * PRODUCT_ROWS
