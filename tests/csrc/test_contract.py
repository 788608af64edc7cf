"""The numerical contract passes right kernels on every input it makes, and catches the bugs that loose checks miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from nybble.csrc.contract import (
    KINDS,
    Bound,
    Case,
    Codes,
    ContractError,
    Verdict,
    activations,
    cases,
    check_product,
    random_codes,
    reference,
)

HALVES = (torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")


def judge(kernel: Callable[[Case], Tensor], case: Case, bound: Bound | None = None, exact: bool = True) -> Verdict:
    return check_product(kernel(case), case.x, case.codes.weight(), case.bias, bound=bound, exact=exact and case.exact)


def finish(y: Tensor, case: Case) -> Tensor:
    """Add the bias to a float32 product and round once."""
    return (y if case.bias is None else y + case.bias.float()).to(case.x.dtype)


def half_weights(case: Case) -> Tensor:
    """The usual kernel: weights rounded to the input's dtype, float32 accumulator."""
    return finish(case.x.float() @ case.codes.weight().to(case.x.dtype).float().T, case)


def float32_weights(case: Case) -> Tensor:
    return finish(case.x.float() @ case.codes.weight().float().T, case)


def scale_each_group(case: Case) -> Tensor:
    """Products of unscaled codes, scaled and summed by group in float32."""
    c, y = case.codes, torch.zeros(len(case.x), len(case.codes.codes))
    for g, start in enumerate(range(0, case.x.shape[1], c.group)):
        tile = slice(start, start + c.group)
        codes = c.codes[:, tile].float() - c.zeros[:, g, None].float()
        y = y + (case.x[:, tile].float() @ codes.T) * c.scales[:, g].float()
    return finish(y, case)


def flush_denormals(case: Case) -> Tensor:
    return half_weights(replace(case, x=case.x.where(case.x.abs().float() >= 2.0**-126, 0)))


def torchs_own(case: Case) -> Tensor:
    y = linear(case.x, case.codes.weight().to(case.x.dtype))
    return y if case.bias is None else y + case.bias


# kernel -> what it declares; None: the weights are rounded to the output's dtype, the default
RIGHT: dict[Callable[[Case], Tensor], Callable[[torch.dtype], Bound | None]] = {
    half_weights: lambda dtype: None,
    flush_denormals: lambda dtype: None,
    float32_weights: lambda dtype: Bound(),
    scale_each_group: lambda dtype: Bound(),
    torchs_own: lambda dtype: Bound(weights=dtype, late_bias=True),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_pass_everything(kernel, dtype):
    for case in cases(dtype=dtype):
        # torch's own rounds twice, once before the bias
        judge(kernel, case, RIGHT[kernel](dtype), exact=kernel is not torchs_own).require(case.name)


@settings(deadline=None, max_examples=30)
@given(kernel=st.sampled_from(list(RIGHT)), dtype=st.sampled_from(HALVES), bits=st.sampled_from([2, 4, 8]),
       group=st.sampled_from([None, 32, 64]), m=st.integers(0, 20), n=st.integers(1, 70), k=st.integers(1, 600),
       seed=st.integers(0, 2**31))
def test_right_kernels_pass_any_shape(kernel, dtype, bits, group, m, n, k, seed):
    for case in cases(dtype=dtype, bits=bits, group=group, shapes=[(m, n, k)], seed=seed):
        judge(kernel, case, RIGHT[kernel](dtype), exact=kernel is not torchs_own).require(case.name)


@pytest.mark.parametrize("dtype", HALVES)
def test_equal_codes_err_alike(dtype):
    """One group a row and inputs of one sign: the errors of rounded weights add up, in a right kernel as well."""
    for seed in range(4):
        for case in cases(dtype=dtype, group=None, kinds=["positive"], shapes=[(64, 200, 1408)], seed=seed):
            weight = case.codes.weight()
            judge(half_weights, case).require()
            rounding = (case.x.double() @ (weight.to(dtype).double() - weight).T).abs()
            independent = torch.finfo(dtype).eps / 2 * (case.x.double().square() @ weight.square().T).sqrt()
            assert (rounding / independent).max() > 2  # standard deviations, where 0.58 is usual


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [0, 1, 17])
def test_eight_bit_products(codes, dtype, m):
    rng = torch.Generator().manual_seed(m)
    spread = 40 if codes == torch.int8 else 100
    a, w = (torch.randn(rows, 1408, generator=rng).mul(spread).clamp(-127, 127).to(codes).double() for rows in (m, 200))
    a_scale, w_scale = (torch.rand(rows, generator=rng) / 100 for rows in (m, 200))
    y = ((a @ w.T).float() * a_scale[:, None] * w_scale).to(dtype)
    x, weight = a * a_scale.double()[:, None], w * w_scale.double()[:, None]
    check_product(y, x, weight, bound=Bound()).require()
    assert check_product(y[:, [*range(199), 0]], x, weight, bound=Bound()).columns == min(m, 1)


def with_codes(change: Callable[[Codes], dict[str, Tensor]]) -> Callable[[Case], Tensor]:
    return lambda case: half_weights(replace(case, codes=replace(case.codes, **change(case.codes))))


def copied(values: Tensor, target: tuple, source: tuple) -> Tensor:
    out = values.clone()
    out[target] = values[source]
    return out


def drop_tail(case: Case) -> Tensor:
    return half_weights(replace(case, x=case.x * (torch.arange(case.x.shape[1]) < case.x.shape[1] - 16)))


def zero_an_element(case: Case) -> Tensor:
    y = half_weights(case)
    y[-1, -1] = 0
    return y


def accumulate_in_half(case: Case) -> Tensor:
    weight = case.codes.weight().to(case.x.dtype).float()
    y = torch.zeros(len(case.x), len(weight), dtype=case.x.dtype)
    for k in range(0, weight.shape[1], 16):  # what one tensor core instruction sums
        y = (y.float() + case.x[:, k:k + 16].float() @ weight[:, k:k + 16].T).to(y.dtype)
    return finish(y.float(), case)


BUGS: dict[str, Callable[[Case], Tensor]] = {
    "zero point off by one": with_codes(lambda c: {"zeros": c.zeros + 1}),
    "swapped nibbles": with_codes(lambda c: {"codes": c.codes.unflatten(1, (-1, 2)).flip(2).flatten(1)}),
    "one column's scales from its neighbour": with_codes(lambda c: {"scales": copied(c.scales, (-1,), (-2,))}),
    "one group's scales from its neighbour": with_codes(lambda c: {"scales": copied(c.scales, (..., 1), (..., 0))}),
    "last 16 of K dropped": drop_tail,
    "one element zeroed": zero_an_element,
    "16-bit accumulator": accumulate_in_half,
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug, dtype):
    for m, n, k in [(1, 200, 1408), (17, 200, 1408), (64, 136, 256), (16, 72, 4096)]:
        caught = {case.name.split()[0] for case in cases(dtype=dtype, shapes=[(m, n, k)])
                  if not judge(BUGS[bug], case).ok}
        assert caught >= {"grid", "normal", "uniform", "positive"}, (m, n, k)


def test_loose_rules_miss_bugs():
    """Rules in use elsewhere pass a right kernel, and also the bugs that touch few elements or few products."""
    rules: dict[str, Callable[[Tensor, Tensor], bool]] = {
        "mean relative": lambda y, ref: bool((y - ref).abs().mean() < 0.04 * ref.abs().mean()),
        "calc_diff": lambda y, ref: bool(1 - 2 * (y * ref).sum() / (y * y + ref * ref).sum() < 1e-3),
        "cosine": lambda y, ref: bool(cosine_similarity(y.flatten(), ref.flatten(), dim=0) > 0.999),
        "allclose": lambda y, ref: torch.allclose(y, ref, rtol=1e-2, atol=1e-2 * ref.abs().max().item()),
    }
    missed: dict[str, set[str]] = {rule: set() for rule in rules}
    for dtype in HALVES:
        [case] = cases(dtype=dtype, kinds=["outliers"], shapes=[(16, 256, 4096)])
        ref = reference(case.x, case.codes.weight(), case.bias)
        for rule, passes in rules.items():
            assert passes(half_weights(case).double(), ref)
            missed[rule] |= {bug for bug, kernel in BUGS.items() if passes(kernel(case).double(), ref)}
    subtle = set(BUGS) - {"zero point off by one", "swapped nibbles"}
    assert missed.pop("allclose") == {"16-bit accumulator"}
    assert missed == dict.fromkeys(missed, subtle)


@pytest.mark.parametrize("accumulate, ok", [(2.0**-24, False), (2.0**-13, True)])
def test_a_short_accumulator_must_be_declared(accumulate, ok):
    [case] = cases(dtype=torch.float16, kinds=["normal"], shapes=[(16, 72, 1408)])
    assert judge(accumulate_in_half, case, Bound(weights=torch.float16, accumulate=accumulate)).ok is ok


ROW = torch.tensor([[1.0, 2.0, 4.0]])
WEIGHT = torch.tensor([[16384.0, 8192.0, 8192.0], [0.5, 0.25, 0.125]])  # y = [65536, 1.5]: the first is beyond float16


@pytest.mark.parametrize("x, y, nonfinite", [
    (ROW, [INF, 1.5], 0),
    (ROW, [-INF, 1.5], 1),
    (ROW, [NAN, 1.5], 1),
    (ROW, [INF, NAN], 1),
    (ROW, [INF, INF], 1),
    (ROW * -1, [-INF, -1.5], 0),
    (ROW * NAN, [NAN, NAN], 0),
    (ROW * INF, [INF, INF], 0),
    (ROW * INF, [INF, NAN], 0),
    (ROW * INF, [INF, -INF], 1),
    (ROW * torch.tensor([INF, -INF, 0]), [NAN, NAN], 0),
])
@pytest.mark.parametrize("exact", [False, True])
def test_nan_and_inf(x, y, nonfinite, exact):
    verdict = check_product(torch.tensor([y], dtype=torch.float16), x, WEIGHT, exact=exact)
    assert (verdict.nonfinite, verdict.out, verdict.ok) == (nonfinite, nonfinite, not nonfinite)


@pytest.mark.parametrize("x, y", [(ROW * NAN, [1.5, 1.5]), (ROW * NAN, [INF, NAN]), (ROW * INF, [65504, INF]),
                                  (ROW * 2, [65504, 3])],
                         ids=["NaN lost", "NaN made Inf", "Inf clamped", "overflow clamped"])
def test_what_must_stay_visible(x, y):
    assert not check_product(torch.tensor([y], dtype=torch.float16), x, WEIGHT).ok


def test_at_the_end_of_the_range():
    for y, ok in [(65504, True), (INF, True), (65472, False), (-INF, False)]:
        verdict = check_product(torch.tensor([[y]], dtype=torch.float16), ROW[:, :1] * 65510, ROW[:, :1], bound=Bound())
        assert verdict.ok is ok, y
    too_large = torch.tensor([[1e5]])  # for float16, as a weight
    for y, ok in [(100, True), (INF, False)]:
        assert check_product(torch.tensor([[y]], dtype=torch.float16), too_large / 1e8, too_large).ok is ok


def test_verdict_says_where():
    x, weight = torch.eye(3), torch.arange(1.0, 13).reshape(4, 3)
    y = x @ weight.T
    assert check_product(y, x, weight).require().ratio == 0
    y[1, 2], y[2, 2] = NAN, 9.5
    verdict = check_product(y, x, weight)
    assert (verdict.where, verdict.expected, verdict.ratio) == ((1, 2), 8.0, INF)
    assert (verdict.out, verdict.total, verdict.rows, verdict.columns, verdict.nonfinite) == (2, 12, 2, 1, 1)
    with pytest.raises(ContractError, match=r"(?s)w4a16 breaks.*2 of 12 .*1 of them NaN.*2 rows and 1 columns.*\[1, 2"):
        verdict.require("w4a16")
    with pytest.raises(ContractError, match=r"(?s)\[3, 3\] and \[4, 3\] is \[3, 4\].*\[4, 3\]"):
        check_product(y.T, x, weight)
    assert check_product(y[:0], x[:0], weight).ok


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_inputs_are_what_they_are_called(dtype):
    made = {kind: activations(kind, 5, 64, dtype=dtype, seed=3).double() for kind in KINDS}
    smallest = torch.finfo(dtype).smallest_normal
    channels = made["outliers"].abs().amax(0).sort().values
    assert channels[-8] > 4 * channels[-9]
    assert made["positive"].min() >= 0 and made["uniform"].abs().max() <= 1
    assert made["grid"].frac().eq(0).all() and made["grid"].count_nonzero() < 160
    assert set(made["zero"].reciprocal().unique().tolist()) == {INF, -INF}
    assert 0 < made["denormal"].abs().median() < smallest
    assert made["huge"].abs().unique().tolist() == [min(torch.finfo(dtype).max, 2.0**100)]
    assert made["onehot"].argmax(1).tolist() == [63, 47, 32, 16, 0]
    assert all(torch.equal(made[kind], activations(kind, 5, 64, dtype=dtype, seed=3).double()) for kind in KINDS)
    assert not torch.equal(made["normal"], activations("normal", 5, 64, dtype=dtype, seed=4).double())


def test_codes_stand_for_their_definition():
    c = random_codes(3, 10, group=4, bits=2, dtype=torch.float16)
    assert c.codes.max() == 3 and c.zeros.shape == c.scales.shape == (3, 3)
    for n in range(3):
        for k in range(10):
            code, zero, scale = c.codes[n, k], c.zeros[n, k // 4], c.scales[n, k // 4]
            assert c.weight()[n, k] == (int(code) - int(zero)) * float(scale)
