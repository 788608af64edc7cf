"""The layout of 2 to 8-bit codes for the tensor cores: every element of a tile unpacks where it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrix import QuantizedMatrix

ROWS = 64  # outputs whose codes lie together: the rows of one matrix instruction
MAX_BLOCK = 128
MIN_BLOCK = 32
ROWS_AT_ONCE = 64 * ROWS  # packed together: some megabytes of codes
MOST_BLOCKS = 1024  # of inputs, for the compiled kernels: they find a block's group by a multiplication
MIN_BYTES = 16  # a matrix instruction's inputs


def block_of(group: int | None) -> int:
    """Inputs in one block: the largest power of two up to 128 that divides the group, so that a block has one scale
    for each output."""
    return MAX_BLOCK if group is None else math.gcd(group, MAX_BLOCK)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedCodes:
    """Codes [N, K] as int8 `bytes` [ceil(N / 64), KB, 64, B], KB = ceil(K / block), B = block * width / 8.

    Byte j of a block holds, lowest bits first, the codes of its inputs j, j + B, j + 2 B, ...: one shift and mask of
    the whole tile gives B neighbouring inputs. 8-bit codes are stored less 128, as signed bytes, `offset` then being
    128, and else 0. 3-bit codes take four bits.
    """

    bytes: Tensor
    block: int
    width: int
    offset: int

    @classmethod
    def pack(cls, matrix: QuantizedMatrix) -> PackedCodes:
        """Pack some outputs at a time; inputs are put in the order of their groups."""
        block = block_of(matrix.scheme.group)
        width = next(w for w in (2, 4, 8) if w >= matrix.scheme.bits and block * w // 8 >= MIN_BYTES)
        offset = 128 if width == 8 else 0
        strips = []
        for start in range(0, matrix.rows, ROWS_AT_ONCE):
            codes = matrix.codes(start, min(start + ROWS_AT_ONCE, matrix.rows))
            if matrix.order is not None:
                codes = codes[:, matrix.order]
            codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % block, 0, -len(codes) % ROWS))
            # [strips, 64, KB, codes in a byte, B] -> [strips, KB, 64, codes in a byte, B]
            parts = codes.unflatten(0, (-1, ROWS)).unflatten(2, (-1, 8 // width, block * width // 8)).transpose(1, 2)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
            strips.append((parts << shifts[:, None]).sum(dim=3, dtype=torch.uint8) ^ offset)
        return cls(bytes=torch.cat(strips).view(torch.int8), block=block, width=width, offset=offset)
