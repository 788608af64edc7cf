"""Quantized matrices of every kind, beside the dense ones they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.scheme import Activation, Scheme

Made = tuple[QuantizedMatrix, Tensor, Tensor]


def make(code: str = "uint", bits: int = 8, *, rows: int, columns: int, group: int | None = None, zeros: bool = False,
         order: bool = False, even: bool = True, scales: str = "rows", activation: Activation | None = None,
         dtype: torch.dtype = torch.float32, seed: int = 0) -> Made:
    """A random matrix, its codes [N, K] and what they stand for [N, K] float32, by the definition.

    scales: one for each of the "rows", "one" for all, or in "blocks" of 5 rows that start anew at row N // 3, as in
    fused parts. order: inputs are scattered over the groups, `even` or not.
    """
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=rng, dtype=torch.uint8)
    if code == "int8":
        codes = codes.view(torch.int8)
    elif code == "fp8_e4m3":
        codes = torch.where((codes & 0x7F) == 0x7F, 0x70, codes).view(torch.float8_e4m3fn)  # no NaN
    scale_rows = torch.arange(rows) if scales == "rows" else torch.zeros(rows, dtype=torch.int64)
    if scales == "blocks":
        first = rows // 3
        scale_rows = torch.cat([torch.arange(first) // 5, -(-first // 5) + torch.arange(rows - first) // 5])
    shape = int(scale_rows.max()) + 1, -(-columns // group) if group else 1
    index = torch.arange(columns) // (group or columns)
    if order:
        index = index[torch.randperm(columns, generator=rng)] if even else torch.zeros_like(index)
    scale = ((torch.rand(shape, generator=rng) + 0.5) / (1 << bits)).to(dtype)
    zero = torch.randint(1 << bits, shape, generator=rng, dtype=torch.uint8)
    middle = torch.full(shape, 1 << (bits - 1) if code == "uint" else 0)
    static = activation is not None and activation.static
    matrix = QuantizedMatrix(
        scheme=Scheme(code=code, bits=bits, group=group, group_rows=5 if scales == "blocks" else 1, zero_point=zeros,
                      act_order=order, activation=activation),
        rows=rows, columns=columns, codes=lambda start, stop: codes[start:stop], scales=scale,
        zeros=zero if zeros else None, scale_rows=scale_rows.int() if scales == "blocks" else None,
        groups=index.int() if order else None, input_scale=torch.tensor(0.03) if static else None)
    at = scale_rows[:, None], index[None]
    return matrix, codes, (codes.float() - (zero if zeros else middle)[at].float()) * scale[at].float()


@pytest.fixture(scope="session")
def make_matrix() -> Callable[..., Made]:
    return make


@pytest.fixture(scope="session")
def inputs() -> Callable[..., list[tuple[str, Tensor, Tensor | None]]]:
    """inputs(M, N, K, dtype) -> (name, x [M, K], bias [N] or None) of every kind but `grid`, for the contract."""
    from nybble.csrc.contract import KINDS, activations

    def of(m: int, n: int, k: int, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor | None]]:
        bias = (torch.arange(n).remainder(9).sub(4) / 4).to(dtype)
        return [(kind, activations(kind, m, k, dtype=dtype, seed=m), None if kind in ("onehot", "denormal") else bias)
                for kind in KINDS if kind != "grid"]

    return of
