"""The numerical contract of a product kernel: how far each element may lie from float64, and inputs that find bugs.

A kernel computes y = x W^T + b, where W is what stored codes stand for. It keeps the contract when every element of y
lies within `Bound` of the product in float64. Tolerances on a whole matrix (cosine, mean relative error) pass a kernel
with one wrong column or group; this one sums what each step of a right kernel may lose. Plain torch, on any device:

    for case in cases(dtype=torch.bfloat16, group=128):
        y = my_kernel(case.x, pack(case.codes), case.bias)
        print(check_product(y, case.x, case.codes.weight(), case.bias, exact=case.exact).require(case.name))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..plugins.errors import NybbleError

SIGMAS = 6.0
FLUSH = 2.0**-126  # float32 below this may be flushed to zero


class ContractError(NybbleError, AssertionError):
    """A kernel's output is not what it was asked to compute."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a kernel declares of its arithmetic; gives the largest error that each element may have.

    Attributes:
        accumulate: unit roundoff of the accumulator, 2^-24 for float32. Some tensor cores keep fewer bits (Hopper's, of
            FP8 products): measure, then declare.
        weights: the dtype that dequantized weights are rounded to before they are multiplied; None where the product
            of activation and code is exact (int8, FP8 codes) or the weights stay float32.
        late_bias: the product is rounded to the output's dtype before the bias is added.

    With A the values that are multiplied, u_out the unit roundoff of the output (2^-11 float16, 2^-8 bfloat16,
    2^-24 float32) and u_w that of `weights`, the error of element ij is at most

        inner = 6 sqrt(K) accumulate (|A||W|^T + |b|)_ij                   accumulation of K products
              + 6 u_w / sqrt(3) |A_i * W_j|_2  +  |A (round(W) - W)^T|_ij  rounding of the weights
        bound = inner + u_out (|ref_ij| + inner) [+ u_out |ref - b|_ij]    rounding of the output [late bias]
              + what values too small for float32 or the output lose to underflow

    6 sqrt(K) and 6 / sqrt(3) are six standard deviations of rounding errors that are independent (Higham & Mary, "A
    new approach to probabilistic rounding error analysis", 2019). Those of weights are not wholly so, since a group has
    few distinct codes and equal codes err alike; the term that multiplies them out covers that part. A serial sum of
    thousands of equal products errs one way only, and may exceed the bound.
    """

    accumulate: float = 2.0**-24
    weights: torch.dtype | None = None
    late_bias: bool = False

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bound [M, N] in float64 on outputs of `dtype`; arguments as for `reference`."""
        a, w, product = x.double(), weight.double(), reference(x, weight)
        b = w.new_zeros(len(w)) if bias is None else bias.double()
        out, size, width = torch.finfo(dtype), a.abs() @ w.abs().T, x.shape[1]
        u_out = out.eps / 2
        inner = SIGMAS * math.sqrt(width) * self.accumulate * (size + b.abs())
        if self.weights is not None:
            spread = SIGMAS * torch.finfo(self.weights).eps / 2 / math.sqrt(3)
            rounded = w.to(self.weights).double()
            lost = torch.where(rounded.isfinite(), rounded - w, 0)  # overflow is an error, not a rounding
            inner += spread * (a.square() @ w.square().T).sqrt() + (a @ lost.T).abs()
        bound = inner + u_out * ((product + b).abs() + inner)
        if self.late_bias:
            bound += u_out * product.abs()
        flushed = FLUSH * (width + a.abs().sum(1, keepdim=True) + w.abs().sum(1))
        return bound + flushed + out.smallest_normal * out.eps


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an output compares with its bound.

    Attributes:
        ratio: the largest error as a share of its bound; inf for a NaN or Inf that should not be there. Near 1 where
            the output's rounding is all the error there is; elsewhere a drift from 0.4 to 0.9 is a finding.
        where: (row, column) of that element, None for an empty output; actual, expected, bound: its values.
        out, total: elements beyond their bounds, and all elements; nonfinite: how many of `out` are NaN or Inf.
        rows, columns: how many hold at least one element beyond its bound.
    """

    ratio: float
    where: tuple[int, int] | None
    actual: float
    expected: float
    bound: float
    out: int
    total: int
    rows: int
    columns: int
    nonfinite: int

    @property
    def ok(self) -> bool:
        return self.out == 0

    def __str__(self) -> str:
        worst = f"worst error {self.ratio:.3g} of its bound"
        if self.ok or self.where is None:
            return worst
        return (f"{self.out} of {self.total} elements beyond their bounds ({self.nonfinite} of them NaN or Inf), in "
                f"{self.rows} rows and {self.columns} columns; {worst} at {list(self.where)}: "
                f"{self.actual:.9g}, expected {self.expected:.9g} +- {self.bound:.3g}")

    def require(self, label: str = "a kernel") -> Verdict:
        """Itself where every element is within its bound; raises ContractError naming `label` otherwise."""
        if self.ok:
            return self
        raise ContractError(f"{label} breaks the numerical contract", found=str(self),
                            fix="look at the rows and columns first: one column is a wrong scale or tail, every column "
                                "a wrong layout or accumulator; Bound must state what the kernel really rounds")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in float64.

    Args:
        x: [M, K], the values that are multiplied: where activations are quantized, what their codes stand for.
        weight: [N, K], the matrix that the stored codes stand for, in float32 or float64.
        bias: [N].
    """
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def check_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bound: Bound | None = None,
                  exact: bool = False) -> Verdict:
    """Compare a kernel's output [M, N] with the float64 product of the same numbers, element by element.

    Args:
        x, weight, bias: as for `reference`.
        bound: the kernel's arithmetic; by default a float32 accumulator, and weights rounded to the output's dtype.
        exact: every partial sum is exact in float32, so only the last rounding is allowed (the kind "grid").

    Finite inputs must give finite outputs, save that an element may be Inf, of the right sign, where the reference
    plus its bound passes the output dtype's range. A NaN or Inf among the inputs must stay visible: where the
    reference is NaN the output is NaN, where it is Inf the output is that Inf or NaN (split sums may meet Inf - Inf).

    Raises ContractError when the output has another shape.
    """
    if (shape := (x.shape[0], weight.shape[0])) != tuple(actual.shape):
        raise ContractError(f"a product of {list(x.shape)} and {list(weight.shape)} is {list(shape)}",
                            found=list(actual.shape))
    product, got = reference(x, weight, bias), actual.double()
    expected = product.to(actual.dtype).double() if exact else product
    if exact:
        limit = torch.zeros_like(expected)
    else:
        limit = (bound or Bound(weights=actual.dtype)).of(x, weight, bias, actual.dtype)
    overflow = got.isinf() & (got.sign() == expected.sign()) & (expected.abs() + limit >= torch.finfo(actual.dtype).max)
    shown = got.isnan() & ~product.isfinite()
    ratio = ((got - expected).abs() / limit).nan_to_num(nan=math.inf, posinf=math.inf)
    ratio[(got == expected) | overflow | shown] = 0
    out = ratio > 1
    where = divmod(int(ratio.argmax()), shape[1]) if ratio.numel() else None
    worst = [float(values[where]) if where else 0.0 for values in (ratio, got, expected, limit)]
    return Verdict(ratio=worst[0], where=where, actual=worst[1], expected=worst[2], bound=worst[3], out=int(out.sum()),
                   total=out.numel(), rows=int(out.any(1).sum()), columns=int(out.any(0).sum()),
                   nonfinite=int((out & ~got.isfinite()).sum()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """A quantized matrix before any packing: W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k // group.

    codes [N, K] and zeros [N, G] are uint8 below 2^bits, scales [N, G] floating point; G = ceil(K / group).
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group: int

    def weight(self) -> Tensor:
        """The matrix [N, K] in float64, exactly."""
        index = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group
        return (self.codes.double() - self.zeros.double()[:, index]) * self.scales.double()[:, index]


def random_codes(n: int, k: int, *, bits: int = 4, group: int | None = 128, dtype: torch.dtype, grid: bool = False,
                 seed: int = 0, device: torch.device | str = "cpu") -> Codes:
    """Random codes [n, k] with zeros and scales of `dtype` per `group` values of a row (None: the whole row).

    Weights have the size that models' weights have, about 0.03. `grid` makes every scale a power of two.
    """
    rng = torch.Generator().manual_seed(seed)
    group = group or k
    groups = -(-k // group)
    codes = torch.randint(2**bits, (n, k), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (n, groups), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=rng) + 0.5) * 0.08 / 2**bits
    if grid:
        scales = torch.exp2(-torch.randint(4, 7, (n, groups), generator=rng).float())
    return Codes(codes=codes.to(device), zeros=zeros.to(device), scales=scales.to(device, dtype), group=group)


Kind = Literal["normal", "uniform", "outliers", "positive", "grid", "zero", "denormal", "huge", "onehot"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def activations(kind: Kind, m: int, k: int, *, dtype: torch.dtype, seed: int = 0,
                device: torch.device | str = "cpu") -> Tensor:
    """Inputs [m, k] of `dtype` that are hard in one way each; equal on every device.

    normal, uniform: no structure. outliers: normal with 8 channels 60 times as large, as language models have.
    positive: one sign, so that errors of a like sign add up. grid: sparse small integers, for zero tolerance. zero: of
    either sign; the output is the bias. denormal: below the dtype's normal range. huge: the largest of the dtype, at
    most 2^100 to leave a float32 accumulator of unscaled codes room. onehot: each row reads out one column of W, the
    last one first, so that a permutation or a lost tail cannot hide behind a sum.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=rng, dtype=torch.float64)
    info = torch.finfo(dtype)
    if kind == "uniform":
        x = torch.rand(m, k, generator=rng, dtype=torch.float64) * 2 - 1
    elif kind == "outliers":
        x[:, torch.randperm(k, generator=rng)[:8]] *= 60
    elif kind == "positive":
        x = x.abs()
    elif kind == "grid":
        x = torch.randint(-8, 9, (m, k), generator=rng).double() * (torch.rand(m, k, generator=rng) < 0.25)
    elif kind == "zero":
        x = x.sign() * 0.0
    elif kind == "denormal":
        x = x.clamp(-1, 1) * info.smallest_normal
    elif kind == "huge":
        x = x.sign() * min(info.max, 2.0**100)
    elif kind == "onehot":
        x = torch.nn.functional.one_hot(torch.linspace(k - 1, 0, m).round().long(), k).double()
    return x.to(device, dtype)


ODD_SHAPES = (*((m, 200, 1408) for m in (0, 1, 2, 7, 15, 16, 17, 64)), (257, 72, 256), (7, 1, 96), (16, 136, 4096))


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One product to compute: x [M, K] and bias [N] of one dtype, codes of an [N, K] matrix, `exact` for the check."""

    name: str
    x: Tensor
    codes: Codes
    bias: Tensor | None
    exact: bool


def cases(*, dtype: torch.dtype, bits: int = 4, group: int | None = 128,
          shapes: Sequence[tuple[int, int, int]] = ODD_SHAPES, kinds: Sequence[Kind] = KINDS, seed: int = 0,
          device: torch.device | str = "cpu") -> Iterator[Case]:
    """Every kind of input at every shape (M, N, K), kinds whose outputs are small without a bias that would hide them.

    The same arguments give the same values on every device.
    """
    for m, n, k in shapes:
        bias = torch.arange(n).remainder(9).sub(4) / 4
        for kind in kinds:
            grid = kind == "grid"
            codes = random_codes(n, k, bits=bits, group=group, dtype=dtype, grid=grid, seed=seed, device=device)
            yield Case(name=f"{kind} {m}x{n}x{k}", codes=codes, exact=grid,
                       x=activations(kind, m, k, dtype=dtype, seed=seed + 1, device=device),
                       bias=None if kind in ("onehot", "denormal") else bias.to(device, dtype))
