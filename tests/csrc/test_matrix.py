"""QuantizedMatrix stands for what its definition says, whatever shares a scale and however inputs are scattered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.scheme import Scheme


@settings(deadline=None, max_examples=100)
@given(code=st.sampled_from(["uint", "int8", "fp8_e4m3"]), bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 40),
       columns=st.integers(1, 90), group=st.sampled_from([None, 8, 32, 100]), zeros=st.booleans(), order=st.booleans(),
       scales=st.sampled_from(["rows", "one", "blocks"]), data=st.data())
def test_dequant_is_the_definition(make_matrix, code, bits, rows, columns, group, zeros, order, scales, data):
    matrix, _, weight = make_matrix(code, bits if code == "uint" else 8, rows=rows, columns=columns, group=group,
                                    zeros=zeros and code == "uint", order=order, scales=scales)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(matrix.dequant(start, stop), weight[start:stop])
    if start < stop:
        part = matrix.part(start, stop)
        assert part.rows == stop - start and torch.equal(part.dequant(0, part.rows), weight[start:stop])
    assert matrix.even
    if order:
        assert torch.equal(matrix.groups[matrix.order], torch.arange(columns).int() // (group or columns))
    else:
        assert matrix.order is None


@pytest.mark.parametrize("groups, order, even", [
    ([0, 0, 1, 1, 2], [0, 1, 2, 3, 4], True), ([1, 0, 2, 1, 0], [1, 4, 0, 3, 2], True),
    ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4], False), ([2, 2, 1, 0, 0], [3, 4, 2, 0, 1], False),
    ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4], False),
], ids=["in order", "scattered", "three in the first", "the short group first", "one group of three"])
def test_whole_groups(groups, order, even):
    matrix = QuantizedMatrix(scheme=Scheme(code="uint", bits=4, group=2), rows=1, columns=5, scales=torch.ones(1, 3),
                             codes=lambda start, stop: torch.zeros(stop - start, 5), groups=torch.tensor(groups))
    assert (matrix.order.tolist(), matrix.even) == (order, even)


@pytest.mark.parametrize("code, bits, zero", [("uint", 2, 2), ("uint", 3, 4), ("uint", 4, 8), ("uint", 8, 128),
                                              ("int8", 8, 0), ("fp8_e4m3", 8, 0)])
def test_the_zero_of_codes_that_store_none(make_matrix, code, bits, zero):
    matrix, _, _ = make_matrix(code, bits, rows=2, columns=4)
    assert matrix.zero == zero


def test_codes_are_asked_for_by_rows(make_matrix):
    """A method need not hold every code at once."""
    matrix, codes, _ = make_matrix(bits=4, rows=7, columns=6)
    asked = []
    replace(matrix, codes=lambda start, stop: asked.append((start, stop)) or codes[start:stop]).dequant(2, 5)
    assert asked == [(2, 5)]
