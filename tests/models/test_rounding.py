"""Norms and activations round for the product behind them exactly where that product takes rounded inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.quantize import Quantized
from nybble.csrc.scaled_gemm import TritonScaledKernel, TritonWeightOnlyKernel
from nybble.csrc.scheme import Activation, Scheme
from nybble.models.layers import GatedMLP, RMSNorm
from nybble.quant import LayerShape, Linear, Part, SplitLinear, Unquantized, shared_rounding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKEN = Activation(dtype="int8", scale="token")
GROUP = Activation(dtype="int8", scale="group", group=32)
STATIC = Activation(dtype="int8", scale="tensor", static=True)
HIDDEN, SIZE = 64, 96


def linear(rows: int, columns: int, activation: Activation | None, kernel=TritonScaledKernel) -> Linear:
    rng = torch.Generator().manual_seed(rows)
    codes = torch.randint(-99, 99, (rows, columns), generator=rng, dtype=torch.int8).to(DEVICE)
    matrix = QuantizedMatrix(scheme=Scheme(code="int8", bits=8, activation=activation), rows=rows, columns=columns,
                             codes=lambda start, stop: codes[start:stop],
                             scales=torch.full((rows, 1), 2e-3, device=DEVICE),
                             input_scale=torch.tensor(0.02, device=DEVICE) if activation is STATIC else None)
    layer = Linear("", LayerShape(in_features=columns, parts=(Part(name="w", size=rows),)), Unquantized(),
                   dtype=torch.float16, device=DEVICE)
    layer.kernel = kernel(matrix, torch.float16)
    return layer


def plain(rows: int, columns: int) -> Linear:
    shape = LayerShape(in_features=columns, parts=(Part(name="w", size=rows),))
    return Linear("", shape, Unquantized(), dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("activations", [(TOKEN, TOKEN), (GROUP, TOKEN), (STATIC, STATIC), (None, TOKEN)],
                         ids=["token", "group", "static", "inputs of 16 bits"])
def test_fused_and_separate_agree(monkeypatch, activations):
    """To the bit: the norm is rounded to 16 bits first, as a norm of its own is."""
    monkeypatch.setattr("nybble.models.layers.missing", lambda device, needed: None)  # the interpreter will do
    first, second = activations
    norm = RMSNorm("norm", HIDDEN, 1e-5, dtype=torch.float16, device=DEVICE)
    norm.weight.fill_(1.5)
    gate_up = linear(2 * SIZE, HIDDEN, first, TritonScaledKernel if first else TritonWeightOnlyKernel)
    mlp = GatedMLP(gate_up, linear(HIDDEN, SIZE, second))
    mlp.connect()
    rng = torch.Generator().manual_seed(0)
    x, residual = (torch.randint(-6, 7, (5, HIDDEN), generator=rng).to(DEVICE, torch.float16) for _ in range(2))
    apart, total = norm(x, residual)
    mlp._inner = None
    wanted = mlp(apart)
    mlp.connect()
    norm.feed(mlp)
    joined, joined_total = norm(x, residual)
    assert isinstance(joined, Quantized) == (first is not None)
    assert torch.equal(total, joined_total) and torch.equal(mlp(joined), wanted)


def test_consumers_must_agree():
    token, group = linear(8, 64, TOKEN), linear(8, 64, GROUP)
    static, bare = linear(8, 64, STATIC), plain(8, 64)
    cases = [((token,), token), ((static,), static), ((token, token), token), ((token, group), None), ((bare,), None),
             ((token, bare), None), ((static, static), None), ((token, nn.Identity()), None), ((nn.Identity(),), None)]
    for consumers, like in cases:
        assert shared_rounding(consumers) is (None if like is None else like.rounding)
    assert SplitLinear([token, token]).rounding is token.rounding and SplitLinear([static, static]).rounding is None


def test_on_cpu_nothing_is_rounded_early():
    norm = RMSNorm("norm", 64, 1e-5, dtype=torch.float16, device=torch.device("cpu"))
    norm.weight.fill_(1)
    norm.feed(linear(8, 64, TOKEN))
    assert isinstance(norm(torch.ones(2, 64, dtype=torch.float16))[0], torch.Tensor)
