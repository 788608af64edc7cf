"""What Triton products share: splits that cover every block once, the smallest tile that fits, devices refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.csrc import launch
from nybble.csrc.launch import MIN_BLOCKS, Tile, missing, split_blocks, split_counters, tile_for
from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.scheme import Scheme

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


@pytest.mark.parametrize("tokens, parts", [(1, 1), (5, 4)])
def test_parts_are_added_in_order_by_the_last_program(tokens, parts):
    """The counters are zeros again, so that the next product finds them so."""
    from nybble.csrc.w4a16_gemm.linear import TritonW4A16Kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (80, 16 * 128), generator=rng, dtype=torch.uint8).to(device)
    matrix = QuantizedMatrix(scheme=Scheme(code="uint", bits=4, group=128), rows=80, columns=16 * 128,
                             codes=lambda start, stop: codes[start:stop], scales=torch.ones(80, 16, device=device))
    x = torch.randint(-2, 3, (tokens, 16 * 128), generator=rng).to(device, torch.float16)
    bias = torch.arange(80, device=device).half()
    kernel = TritonW4A16Kernel(matrix, torch.float16)
    kernel.programs, kernel.counters = 2 * parts, split_counters(2 * parts, device)
    for _ in range(2):  # integers: exact in float32, and rounded once
        assert torch.equal(kernel(x, bias), (x.float() @ matrix.dequant(0, 80).T + bias).half())
        assert kernel.counters.count_nonzero() == 0
