"""What Triton products share: splits that cover every block once, the smallest tile that fits, devices refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.csrc import launch
from nybble.csrc.launch import MIN_BLOCKS, Tile, add_splits, missing, split_blocks, tile_for

TILES = [Tile(n=64, m=16, warps=4, stages=3), Tile(n=64, m=64, warps=4, stages=4)]


@given(tiles=st.integers(1, 500), blocks=st.integers(1, 500), programs=st.integers(1, 1000))
def test_splits_cover_every_block_once(tiles, blocks, programs):
    splits = split_blocks(tiles, blocks, programs)
    each = -(-blocks // splits)
    assert 1 <= splits <= 16 and (splits - 1) * each < blocks <= splits * each, "none is empty"
    assert splits == 1 or each >= MIN_BLOCKS
    assert tiles < programs or splits == 1


@pytest.mark.parametrize("tokens, tile", [(1, 0), (16, 0), (17, 1), (64, 1), (1000, 1)])
def test_the_smallest_tile_that_holds_all_tokens(tokens, tile):
    assert tile_for(tokens, TILES) is TILES[tile]


def test_devices_that_cannot_run_it(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert missing(cuda, (8, 0)) is None
    assert missing(cuda, (8, 9)) == "needs compute capability 8.9, this device has 8.6"
    assert missing(torch.device("cpu"), (8, 0)) == "runs on CUDA, not on cpu"
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "triton is not installed" in missing(cuda, (8, 0))


@pytest.mark.parametrize("bias", [None, torch.arange(7.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [1, 300])
def test_parts_are_added_in_order(rows, bias):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = torch.randn(3, rows, 7, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(rows, 7, device=device)
    add_splits(parts, None if bias is None else bias.to(device), out)
    assert torch.equal(out, parts[0] + parts[1] + parts[2] + (0 if bias is None else bias.to(device)))
