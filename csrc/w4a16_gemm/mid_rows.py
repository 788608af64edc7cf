"""Some to some hundred tokens by 4-bit codes: the compiled kernel for Hopper, what it is for, how it splits inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..launch import multiprocessors
from ..ops import optional_op
from .many_rows import Format
from .packing import MAX_BLOCK, MOST_BLOCKS, ROWS, PackedCodes

MID_TOKENS = 256
HOPPER = 9
# Tokens up to which a tile of so many outputs is taken, and what it is beyond (csrc/w4a16_gemm/mid_rows.cu).
FEW_TOKENS, MANY_TOKENS, WIDE, NARROW = 64, 128, 4 * ROWS, 2 * ROWS
# The kernel can add up eight parts of the inputs. More than two were slower than Triton's programs, which are smaller,
# and so were tiles that leave more of the device idle (H200, us, Triton's and this: 4096 outputs of 4096 inputs by 32
# tokens 12.0 and 14.1, of 14336 inputs 25.5 and 34.9; but 28672 of 4096 46.6 and 35.5, by 64 tokens 88.9 and 45.1).
MAX_SPLITS, FILLED = 2, 0.7


def mid_rows_op(packed: PackedCodes, columns: int) -> Callable[..., None] | None:
    """The kernel, if it can multiply by these codes and is there."""
    device = packed.bytes.device
    if (packed.width != 4 or packed.block != MAX_BLOCK or columns % 16 or packed.bytes.shape[1] > MOST_BLOCKS
            or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER):
        return None
    return optional_op("w4_mid_rows", device)


def splits_of(tokens: int, rows: int, blocks: int, programs: int) -> int | None:
    """Into how many parts of its `blocks` of inputs a product goes, each part of a tile on one of `programs`
    multiprocessors; None where it is better left to others."""
    outputs, at_once = (WIDE, FEW_TOKENS) if tokens <= FEW_TOKENS else (NARROW, MANY_TOKENS)
    tiles = -(-rows // outputs) * -(-tokens // at_once)
    splits = max(1, min(programs // tiles, MAX_SPLITS))
    splits = -(-blocks // -(-blocks // splits))  # none is empty
    return splits if tokens <= MID_TOKENS and tiles * splits >= FILLED * programs else None


def multiply(op: Callable[..., None], x: Tensor, weights: Mapping[str, Tensor], form: Format, bias: Tensor | None,
             out: Tensor) -> bool:
    """out [M, N] = x [M, K] W^T + bias, W of `weights` as `TritonW4A16Kernel` keeps them, x in stored order.

    Returns whether it is done: False where others are better at it.
    """
    codes = weights["codes"]
    splits = splits_of(len(x), out.shape[1], codes.shape[1], multiprocessors(x.device))
    if splits is None:
        return False
    op(out, x, codes, weights["scales"], weights.get("zeros"), bias, form.blocks_per_group, form.zero, splits)
    return True
