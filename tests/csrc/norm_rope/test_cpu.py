"""The CPU's norm and gate against float64, on odd widths, rows of any stride, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.norm_rope import rms_norm, rms_norm_for, silu_mul, silu_mul_for
from nybble.csrc.norm_rope.cpu import rms_norm_cpu, silu_mul_cpu
from nybble.csrc.ops import op_missing, optional_op

CPU = torch.device("cpu")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

built = pytest.mark.skipif(op_missing("cpu_rms_norm", CPU) is not None, reason=str(op_missing("cpu_rms_norm", CPU)))


def close(found, wanted, dtype):
    assert found.dtype == dtype and found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= BOUND[dtype] * wanted.abs() + 1e-6).all()


@built
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [(3, 512), (1, 7), (2, 5, 96), (70, 1000), (0, 16)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape, with_residual, dtype):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=g).to(dtype)
    x, weight = wide[..., : shape[-1]], torch.rand(shape[-1], generator=g).to(dtype)
    residual = torch.randn(shape, generator=g).to(dtype) if with_residual else None
    found, total = rms_norm_cpu(x, weight, 1e-5, residual)
    summed = x if residual is None else x + residual  # rounded as it is kept
    assert torch.equal(total, summed)
    close(found, rms_norm(summed.double(), weight.double(), 1e-5)[0], dtype)


@built
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("rows, width", [(3, 512), (1, 5), (64, 1376), (0, 8)])
def test_silu_mul(rows, width, dtype):
    x = (torch.randn(rows, 2 * width + 1, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)[:, : 2 * width]
    close(silu_mul_cpu(x), silu_mul(x.double()), dtype)


@built
def test_the_ends_of_silu():
    gates = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e30, -1e30, float("inf"), float("nan")])
    found = silu_mul_cpu(torch.cat((gates, torch.ones(8)))[None])[0]
    assert found[6] == float("inf") and found[7].isnan()
    close(found[:6], torch.nn.functional.silu(gates[:6].double()), torch.float32)


@built
def test_nan_stays_in_its_row():
    x = torch.ones(2, 40)
    x[1, 33] = float("nan")
    out, _ = rms_norm_cpu(x, torch.ones(40), 1e-6)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_without_the_library_plain_torch_runs(monkeypatch):
    monkeypatch.setenv("NYBBLE_JIT", "0")
    monkeypatch.setenv("NYBBLE_CACHE_DIR", "/nowhere")
    from nybble.csrc import ops

    for function in (ops._missing, optional_op):
        function.cache_clear()
    try:
        assert rms_norm_for(CPU) is rms_norm and silu_mul_for(CPU) is silu_mul
    finally:
        for function in (ops._missing, optional_op):
            function.cache_clear()
