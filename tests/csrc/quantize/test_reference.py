"""Rounding inputs to 8 bits: scales, ties, what is no number, and groups that end short."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.csrc.quantize import dequantize, fake_quantize, quantize
from nybble.csrc.scheme import Activation

INT8, FP8 = Activation(dtype="int8", scale="token"), Activation(dtype="fp8_e4m3", scale="token")
STATIC = {"int8": Activation(dtype="int8", scale="tensor", static=True),
          "fp8_e4m3": Activation(dtype="fp8_e4m3", scale="tensor", static=True)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = torch.tensor(1.0)


def grouped(dtype: str, group: int) -> Activation:
    return Activation(dtype=dtype, scale="group", group=group)


@settings(deadline=None, max_examples=150)
@given(code=st.sampled_from(["int8", "fp8_e4m3"]), group=st.sampled_from([None, 1, 7, 32, 200]),
       tokens=st.integers(0, 4), columns=st.integers(1, 100), size=st.integers(-12, 4), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 99))
def test_codes_are_the_nearest(code, group, tokens, columns, size, dtype, seed):
    """Each value comes back within half a step of its own token's or group's scale, the peak too."""
    activation = grouped(code, group) if group else Activation(dtype=code, scale="token")
    x = (torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**size).to(dtype)
    codes, scale = quantize(x, activation)
    groups = -(-columns // group) if group else 1
    assert codes.shape == x.shape and codes.dtype == (torch.int8 if code == "int8" else torch.float8_e4m3fn)
    assert scale.shape == (tokens, groups) and scale.dtype == torch.float32
    index = torch.arange(columns) // (group or columns)
    for t in range(tokens):
        for g in range(groups):
            peak = float(x[t, index == g].float().abs().max())
            largest = 127.5 if code == "int8" else 448.0
            assert scale[t, g] == max(torch.tensor(peak) / largest, torch.finfo(torch.float32).eps)
    spread = scale[:, index] if tokens else x.float()
    error = (dequantize(codes, scale, activation) - x.float()).abs()
    # Neighbours of E4M3 lie 2^-3 of a value's power of two apart, below 2^-6 all alike.
    step = spread if code == "int8" else torch.maximum((x.float() / spread).abs() * 2.0**-3, ONE * 2.0**-9) * spread
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert torch.equal(fake_quantize(x, activation), dequantize(codes, scale, activation).to(dtype))


@pytest.mark.parametrize("x, codes", [
    ([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [0, 2, 2, 0, -2, -2]),
    ([126.5, 127.5, 128, 300, -127.5, -128.5, -300], [126, 127, 127, 127, -128, -128, -128]),
], ids=["to even", "to the ends"])
def test_int8_ties_and_ends(x, codes):
    assert quantize(torch.tensor([x]), STATIC["int8"], ONE)[0].tolist() == [codes]


@pytest.mark.parametrize("x, codes", [
    ([17, 19, 21, 23, -17, -19], [16, 20, 20, 24, -16, -20]),
    ([448, 449, 1e9, -1e9, 2.0**-9, 2.0**-10, 3 * 2.0**-10], [448, 448, 448, -448, 2.0**-9, 0, 2.0**-8]),
], ids=["to even", "to the ends"])
def test_fp8_ties_and_ends(x, codes):
    assert quantize(torch.tensor([x]).float(), STATIC["fp8_e4m3"], ONE)[0].float().tolist() == [codes]


@pytest.mark.parametrize("activation, scale", [(INT8, 2.0), (FP8, 255 / 448)], ids=["int8", "fp8"])
def test_the_largest_value_sets_the_scale(activation, scale):
    """127.5 for int8: positive peaks are cut to 127, negative ones reach -128."""
    codes, found = quantize(torch.tensor([[255.0, -3.0], [-255.0, 3.0]]), activation)
    assert torch.equal(found, torch.full((2, 1), scale))
    assert codes[:, 0].float().tolist() == ([127, -128] if activation is INT8 else [448, -448])


@pytest.mark.parametrize("activation", [INT8, FP8, grouped("int8", 2), grouped("fp8_e4m3", 2)],
                         ids=["int8", "fp8", "int8 groups", "fp8 groups"])
def test_zeros_stay_zero(activation):
    assert torch.equal(fake_quantize(torch.zeros(2, 3), activation), torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_what_is_no_number_stays_none(dtype, bad):
    """In its token or group alone."""
    x = torch.ones(3, 5)
    x[1, 4] = bad
    for activation, scale in ((Activation(dtype=dtype, scale="token"), None), (STATIC[dtype], ONE)):
        assert fake_quantize(x, activation, scale).isnan().all(1).tolist() == [False, True, False]
    found = fake_quantize(x, grouped(dtype, 2))
    assert found.isnan().nonzero().tolist() == [[1, 4]] and found[~found.isnan()].isfinite().all()


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_a_short_last_group_is_a_group(dtype):
    x = torch.tensor([[1.0, -2, 3, 4, 100]])
    whole, short = quantize(x[:, :3], grouped(dtype, 3)), quantize(x[:, 3:], Activation(dtype=dtype, scale="token"))
    codes, scale = quantize(x, grouped(dtype, 3))
    assert torch.equal(scale, torch.cat([whole[1], short[1]], 1))
    assert torch.equal(codes.float(), torch.cat([whole[0], short[0]], 1).float()) and codes.is_contiguous()
