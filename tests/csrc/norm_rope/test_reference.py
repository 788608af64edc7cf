"""RMSNorm, rotary and gated SiLU against float64 arithmetic written another way."""

from __future__ import annotations

import pytest
import torch

from nybble.csrc.norm_rope import rms_norm, rotary, silu_mul

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("t", [0, 1, 17])


def close(found, expected, dtype):
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@dtypes
@rows
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, t, with_residual):
    g = torch.Generator().manual_seed(t)
    x, r = torch.randn(2, t, 48, generator=g).to(dtype)
    w = torch.rand(48, generator=g).to(dtype) + 0.5
    y, total = rms_norm(x, w, 1e-5, r if with_residual else None)
    s = (x + r if with_residual else x).double()
    assert y.dtype == total.dtype == dtype
    close(total, s, dtype)
    close(y, s / (s.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double(), dtype)


@dtypes
@rows
def test_rotary_is_a_complex_rotation(dtype, t):
    g = torch.Generator().manual_seed(t)
    x = torch.randn(t, 3, 16, generator=g).to(dtype)
    angle = torch.rand(t, 1, 8, generator=g, dtype=torch.float64) * 6
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.polar(torch.ones_like(angle), angle)
    close(rotary(x, cos, sin), torch.cat([turned.real, turned.imag], -1), dtype)


@dtypes
@rows
def test_silu_mul(dtype, t):
    x = torch.randn(t, 20, generator=torch.Generator().manual_seed(t)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    close(silu_mul(x), gate / (1 + (-gate).exp()) * up, dtype)
