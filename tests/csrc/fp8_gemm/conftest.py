"""An FP8 matrix for the two kernels that multiply it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.scheme import Activation, Scheme


@pytest.fixture(scope="session")
def fp8_matrix() -> Callable[..., QuantizedMatrix]:
    """fp8_matrix(n, k, tensor=, activation=, device=): random codes, with one scale or one for each row."""

    def make(n: int, k: int, *, tensor: bool, activation: Activation, device: torch.device | str) -> QuantizedMatrix:
        rng = torch.Generator().manual_seed(n * k)
        codes = (torch.randn(n, k, generator=rng) * 40).to(torch.float8_e4m3fn).to(device)
        scales = (torch.rand(1 if tensor else n, 1, generator=rng) + 0.5).to(device) / 2000
        return QuantizedMatrix(
            scheme=Scheme(code="fp8_e4m3", bits=8, activation=activation), rows=n, columns=k,
            codes=lambda start, stop: codes[start:stop], scales=scales,
            input_scale=torch.tensor(0.013, device=device) if activation.static else None)

    return make
