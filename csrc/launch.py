"""What Triton products share: whether they can run here, their tiles, and how inputs are split to fill a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# A split of fewer blocks than this costs more in writing its sums than it gains in reading weights.
MIN_BLOCKS = 4


def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 on CPU, where Triton's interpreter runs."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def missing(device: torch.device, needed: tuple[int, int]) -> str | None:
    """Why a Triton kernel that needs a compute capability cannot run on a device; None when it can."""
    if device.type != "cuda":
        return f"runs on CUDA, not on {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'nybble[cuda]')"
    if (found := torch.cuda.get_device_capability(device)) < needed:
        have, want = (".".join(map(str, c)) for c in (found, needed))
        return f"needs compute capability {want}, this device has {have}"
    return None


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Launch settings of a Triton kernel whose first line is `triton_early.start_early`: from Hopper on it is launched
    while the one before it still runs, so that nothing lies between them but the wait for its results."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def lacks_fp8(device: torch.device) -> bool:
    """Whether Triton has no FP8 type for a device: kernels are then given the codes as int8, and `FP8_BITS`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def split_blocks(tiles: int, blocks: int, programs: int) -> int:
    """Into how many parts to split the inputs of a product of `tiles` programs, so that `programs` are in flight."""
    wanted = -(-programs // tiles)
    splits = max(1, min(wanted, blocks // MIN_BLOCKS, 16))
    return -(-blocks // -(-blocks // splits))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Outputs and tokens of one program, its warps and the depth of its pipeline."""

    n: int
    m: int
    warps: int
    stages: int


def tile_for(tokens: int, tiles: Sequence[Tile]) -> Tile:
    """The first tile that holds all tokens, else the last."""
    return next((tile for tile in tiles if tokens <= tile.m), tiles[-1])


def split_counters(programs: int, device: torch.device) -> Tensor:
    """What the programs that share a tile count themselves by, for every product that `split_blocks` splits: zeros.

    A product leaves them zeros, and may not overlap with another one that has the same.
    """
    return torch.zeros(programs, dtype=torch.int32, device=device)


def split_parts(out: Tensor, splits: int) -> Tensor:
    """Where `splits` programs put their sums [splits, *out.shape] float32; out itself when there is one."""
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
