"""Layout: the slots of a step sorted by expert into tiles of equal size, made on the device without asking the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..launch import early

CHUNK = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Slot t * top_k + j is token t's j-th expert. `slots` [max_tiles * block] int32: the slots of a tile, -1 where it
    is padded; `tiles` [max_tiles] int32: each tile's expert, -1 for tiles that are not needed. Sizes depend on the
    number of tokens alone. `most`: slots of a tile behind which all are padding.
    """

    slots: Tensor
    tiles: Tensor
    block: int
    most: int

    @property
    def max_tiles(self) -> int:
        return len(self.tiles)


def align(experts: Tensor, count: int, block: int) -> Layout:
    """The layout of experts [T, top_k] (numbers below `count`, a token's all different, or -1: in no tile), `block`
    slots to a tile."""
    from .triton_kernel import align_kernel

    slots = experts.numel()
    max_tiles = slots // block + min(slots, count)
    table = torch.empty(max_tiles * block, dtype=torch.int32, device=experts.device)
    tiles = torch.empty(max_tiles, dtype=torch.int32, device=experts.device)
    if slots:
        align_kernel[(count,)](experts, table, tiles, slots, count, max_tiles, BINS=1 << (count - 1).bit_length(),
                               BLOCK_M=block, CHUNK=CHUNK, num_warps=4, **early(experts.device))
    return Layout(slots=table, tiles=tiles, block=block, most=min(block, len(experts)))


def combine(y: Tensor, weights: Tensor, experts: Tensor, *, dtype: torch.dtype = torch.float32,
            beside: Tensor | None = None) -> Tensor:
    """y [T * top_k, H], weights [T, top_k] float32, experts [T, top_k] -> [T, H]: each token's weighted sum.

    It is summed in float32 and rounded to `dtype`, then `beside` [T, H] of that dtype is added.
    """
    from .triton_kernel import combine_kernel

    tokens, top_k = experts.shape
    out = y.new_empty(tokens, y.shape[1], dtype=dtype)
    if tokens:
        combine_kernel[(tokens, -(-y.shape[1] // CHUNK))](
            y, weights, experts, out if beside is None else beside.contiguous(), out, y.shape[1], TOP_K=top_k,
            HAS_BESIDE=beside is not None, BLOCK=CHUNK, **early(y.device))
    return out
