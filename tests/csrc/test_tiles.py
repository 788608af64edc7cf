"""Tiles: packing loses nothing, and every scheme is multiplied within the contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.contract import Bound, check_product
from nybble.csrc.quantize import fake_quantize
from nybble.csrc.scheme import Activation, Scheme
from nybble.csrc.select import Problem
from nybble.csrc.tiles import TileKernel, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKEN = Activation(dtype="fp8_e4m3", scale="token")


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """16 rows at a time, so that a few dozen are several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.csrc.tiles.TILE", 1)
        yield


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(0, 5), columns=st.integers(0, 70), seed=st.integers(0, 99))
def test_unpack_undoes_pack(bits, rows, columns, seed):
    codes = torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits, columns), codes)
    widths = {2: [2], 3: [2, 1], 4: [4], 8: [8]}[bits]
    assert [plane.shape for plane in planes] == [(rows, -(-columns * width // 8)) for width in widths]


def test_the_layout():
    """Byte j holds columns j, j + W, ...; of 3 bits the low two and the high one lie apart."""
    assert pack(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), 4)[0].tolist() == [[0x41, 0x52, 0x03]]
    low, high = pack(torch.tensor([[7, 1, 4, 2, 5, 0, 6, 3]], dtype=torch.uint8), 3)
    assert (low.tolist(), high.tolist()) == ([[0b10_01_00_11, 0b11_00_10_01]], [[0b01010101]])


@settings(deadline=None, max_examples=100)
@given(code=st.sampled_from(["uint", "uint", "int8", "fp8_e4m3"]), bits=st.sampled_from([2, 3, 4, 8]),
       rows=st.integers(1, 40), columns=st.integers(1, 90), group=st.sampled_from([None, 8, 32, 100]),
       zeros=st.booleans(), order=st.booleans(), scales=st.sampled_from(["rows", "one", "blocks"]), data=st.data())
def test_dequant_is_the_matrix(make_matrix, code, bits, rows, columns, group, zeros, order, scales, data):
    matrix, _, weight = make_matrix(code, bits if code == "uint" else 8, rows=rows, columns=columns, group=group,
                                    zeros=zeros and code == "uint", order=order, scales=scales)
    assert TileKernel.supports(Problem.of(matrix, torch.float32)) is None
    kernel = TileKernel(matrix, torch.float32)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    expected = weight if matrix.order is None else weight[:, matrix.order]
    assert torch.equal(kernel.dequant(start, stop), expected[start:stop])
    per = bits if code == "uint" else 8
    planes = sum(plane.nbytes for plane in kernel.planes)
    assert rows * columns * per / 8 <= planes <= rows * (columns * per / 8 + 2)


FORMS = {
    "int4": dict(bits=4, group=32), "int4 zp": dict(bits=4, group=32, zeros=True),
    "int3 act-order": dict(bits=3, group=32, zeros=True, order=True), "int2": dict(bits=2, group=8, scales="one"),
    "int8": dict(bits=8), "int8 signed": dict(code="int8"),
    "fp8 blocks": dict(code="fp8_e4m3", group=32, scales="blocks"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("form", FORMS)
def test_contract(make_matrix, inputs, form, m, dtype):
    matrix, _, weight = make_matrix(rows=40, columns=200, **FORMS[form])
    kernel = TileKernel(matrix, dtype)
    bound = Bound(weights=None if dtype == torch.float32 else dtype, late_bias=True)
    for kind, x, bias in inputs(m, 40, 200, dtype):
        check_product(kernel(x, bias), x, weight, bias, bound=bound).require(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [
    TOKEN, Activation(dtype="int8", scale="token"), Activation(dtype="fp8_e4m3", scale="tensor", static=True),
    Activation(dtype="int8", scale="group", group=64),
], ids=["fp8 token", "int8 token", "fp8 static", "int8 group"])
def test_inputs_are_rounded_first(make_matrix, inputs, activation, dtype):
    matrix, _, weight = make_matrix(activation.dtype, rows=40, columns=200, activation=activation)
    kernel = TileKernel(matrix, dtype)
    bound = Bound(weights=None if dtype == torch.float32 else dtype, late_bias=True)
    for kind, x, bias in inputs(5, 40, 200, dtype):
        rounded = fake_quantize(x, activation, matrix.input_scale)
        check_product(kernel(x, bias), rounded, weight, bias, bound=bound).require(kind)


@pytest.mark.parametrize("code", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("scale, group", [("tensor", None), ("token", None), ("group", 64)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(make_matrix, code, scale, group, bad):
    activation = Activation(dtype=code, scale=scale, static=scale == "tensor", group=group)
    kernel = TileKernel(make_matrix(code, rows=20, columns=100, activation=activation)[0], torch.float32)
    x = torch.ones(3, 100)
    x[1, 99] = bad
    out = kernel(x, torch.ones(20))
    assert out.isnan().all(1).tolist() == [False, True, False] and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 100), (100,), (2, 0, 100)], ids=["3-D", "1-D", "3-D without tokens"])
def test_inputs_of_any_rank(make_matrix, shape):
    matrix, _, weight = make_matrix(bits=4, rows=40, columns=100, group=32, zeros=True, order=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = TileKernel(matrix, torch.float32)(x, torch.ones(40))
    assert out.shape == (*shape[:-1], 40)
    bound = Bound(late_bias=True)
    check_product(out.reshape(-1, 40), x.reshape(-1, 100), weight, torch.ones(40), bound=bound).require()


@pytest.mark.parametrize("change, words", [
    (dict(scheme=Scheme(code="nf4", bits=4)), "codes nf4 of 4 bits are not"),
    (dict(scheme=Scheme(code="uint", bits=5)), "codes uint of 5 bits are not"),
    (dict(even=False), "scattered over groups of unequal size"),
])
def test_refusals(change, words):
    fields = dict(scheme=Scheme(code="uint", bits=4, group=32), rows=8, columns=64, dtype=torch.float32,
                  device=torch.device("cpu"))
    assert TileKernel.supports(Problem(**fields)) is None
    assert words in TileKernel.supports(Problem(**fields | change))
