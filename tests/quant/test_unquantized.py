"""Plain weights, packed for the CPU or not, give one product and unpack to what was loaded."""

from __future__ import annotations

import pytest
import torch

from nybble.quant import LayerShape, Part, Unquantized


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 64, 257])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_is_float64s(rows, with_bias, dtype):
    generator = torch.Generator().manual_seed(rows)
    shape = LayerShape(in_features=1408, parts=(Part(name="a", size=96), Part(name="b", size=33)))
    weight = torch.randn(129, 1408, generator=generator).to(dtype)
    x = torch.randn(rows, 1408, generator=generator).to(dtype)
    bias = torch.randn(129, generator=generator).to(dtype) if with_bias else None
    method = Unquantized()
    weights = method.after_load({"weight": weight.clone()}, shape)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(method.apply(weights, x, bias).double(), expected, rtol=1e-2, atol=bound)
    assert torch.equal(method.dequant(weights), weight.float())
    strided = torch.randn(rows, 2, 1408, generator=generator).to(dtype)[:, 0]
    torch.testing.assert_close(method.apply(weights, strided, bias), method.apply(weights, strided.contiguous(), bias))
