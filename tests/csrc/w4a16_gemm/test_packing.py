"""PackedCodes: every code lies where its description says, whatever the width, the group and the order of inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.scheme import Scheme
from nybble.csrc.select import Problem
from nybble.csrc.w4a16_gemm import PackedCodes, TritonW4A16Kernel
from nybble.csrc.w4a16_gemm.packing import block_of


def code_at(packed: PackedCodes, n: int, k: int) -> int:
    """By the definition: strip and row of the output, block of the input, byte and shift within it."""
    length = packed.block * packed.width // 8
    at = k % packed.block
    byte = int(packed.bytes[n // 64, k // packed.block, n % 64, at % length]) & 0xFF
    return (byte ^ packed.offset) >> (at // length * packed.width) & ((1 << packed.width) - 1)


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([None, 32, 64, 96, 128, 256]), order=st.booleans(),
       rows=st.sampled_from([1, 63, 64, 70]), columns=st.integers(1, 300), data=st.data())
def test_every_code_lies_where_it_should(make_matrix, bits, group, order, rows, columns, data):
    matrix, codes, _ = make_matrix(bits=bits, rows=rows, columns=columns, group=group, order=order)
    packed = PackedCodes.pack(matrix)
    length = packed.block * packed.width // 8
    assert packed.bytes.shape == (-(-rows // 64), -(-columns // packed.block), 64, length) and length >= 16
    for n in {0, rows - 1, data.draw(st.integers(0, rows - 1))}:
        for k in range(columns):
            stored = k if matrix.order is None else int(matrix.order[k])
            assert code_at(packed, n, k) == codes[n, stored], (n, k)


@pytest.mark.parametrize("group, block", [(None, 128), (32, 32), (64, 64), (96, 32), (128, 128), (256, 128), (48, 16)])
def test_a_block_has_one_scale(group, block):
    assert block_of(group) == block


@pytest.mark.parametrize("change, words", [
    (dict(scheme=Scheme(code="int8", bits=8)), "unsigned codes of 2, 3, 4 or 8 bits"),
    (dict(dtype=torch.float32), "multiplies 16-bit inputs, not float32"),
    (dict(scheme=Scheme(code="uint", bits=4, group=48)), "groups of a multiple of 32 inputs, not 48"),
    (dict(even=False), "groups of unequal size"), (dict(scale_rows=True), "needs scales for each row"),
])
def test_refusals(monkeypatch, change, words):
    fields = dict(scheme=Scheme(code="uint", bits=4, group=64), rows=64, columns=256, dtype=torch.float16,
                  device=torch.device("cpu"))
    assert TritonW4A16Kernel.supports(Problem(**fields)) == "runs on CUDA, not on cpu"
    monkeypatch.setattr("nybble.csrc.w4a16_gemm.linear.missing", lambda device, needed: None)
    assert TritonW4A16Kernel.supports(Problem(**fields)) is None
    assert words in TritonW4A16Kernel.supports(Problem(**fields | change))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_scale_for_all(make_matrix, bits, zeros):
    """The kernel is given each output's scale and zero, by group."""
    matrix, _, _ = make_matrix(bits=bits, rows=70, columns=200, group=64, scales="one", zeros=zeros)
    weights = TritonW4A16Kernel(matrix, torch.float16).weights
    assert torch.equal(weights["scales"], matrix.scales.T.expand(4, 70))
    if zeros:
        offset = 128 if bits == 8 else 0
        assert torch.equal(weights["zeros"].int() + offset, matrix.zeros.int().T.expand(4, 70))
