"""Choosing: a pin is taken or refused, else the highest priority; every other candidate has exactly one reason."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.csrc.scheme import Scheme
from nybble.csrc.select import Kernels, Problem, check_pin, choose
from nybble.plugins.errors import UsageError


def candidate(label: str, rank: int, refused: Mapping[int, str] | None = None) -> type:
    """One that refuses the problems named."""
    class Candidate:
        name, priority = label, rank

        @classmethod
        def supports(cls, problem: int) -> str | None:
            return (refused or {}).get(problem)

    return Candidate


FAST, SLOW, PICKY = candidate("fast", 10), candidate("slow", -10), candidate("picky", 20, {2: "not 2", 3: "not 3"})
TWIN = candidate("twin", 10)
ALL = {"slow": SLOW, "fast": FAST, "picky": PICKY}
SLOWER = "{0} goes first (priority {1} over {2})"


@pytest.mark.parametrize("problems, known, pin, chosen, refusals", [
    ([1], ALL, None, PICKY, {"slow": SLOWER.format("picky", 20, -10), "fast": SLOWER.format("picky", 20, 10)}),
    ([2], ALL, None, FAST, {"picky": "not 2", "slow": SLOWER.format("fast", 10, -10)}),
    ([1, 3, 2], ALL, None, FAST, {"picky": "not 3", "slow": SLOWER.format("fast", 10, -10)}),
    ([1], ALL, "slow", SLOW, {"fast": "slow is pinned", "picky": "slow is pinned"}),
    ([2], ALL, "slow", SLOW, {"fast": "slow is pinned", "picky": "not 2"}),
    ([2], ALL, "picky", None, {"picky": "not 2", "slow": "picky is pinned", "fast": "picky is pinned"}),
    ([1], ALL, "reference", None, dict.fromkeys(ALL, "reference is pinned")),
    ([1], {"fast": FAST, "twin": TWIN}, None, FAST, {"twin": SLOWER.format("fast", 10, 10)}),
    ([1], {"twin": TWIN, "fast": FAST}, None, TWIN, {"fast": SLOWER.format("twin", 10, 10)}),
    ([2], {"picky": PICKY}, None, None, {"picky": "not 2"}),
    ([1], {}, None, None, {}),
], ids=["priority", "a refusal", "the first refusal", "pin", "pin and refusal", "refused pin", "pin of nobody", "tie",
        "tie turned round", "all refuse", "none"])
def test_choose(problems, known, pin, chosen, refusals):
    choice = choose(problems, known, pin)
    assert (choice.chosen, dict(choice.refusals)) == (chosen, refusals)


@given(ranks=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=6), pin=st.none() | st.integers(0, 6))
def test_every_other_has_a_reason(ranks, pin):
    known = {str(i): candidate(str(i), rank, {1: "no"} if refuses else {}) for i, (rank, refuses) in enumerate(ranks)}
    choice = choose([1], known, None if pin is None else str(pin))
    taken = {choice.chosen.name} if choice.chosen else set()
    assert choice.refusals.keys() == known.keys() - taken and all(choice.refusals.values())
    able = [rank for i, (rank, refuses) in enumerate(ranks) if not refuses and pin in (None, i)]
    assert (choice.chosen.priority == max(able)) if able else choice.chosen is None


@pytest.mark.parametrize("pin, fix", [("tilse", "did you mean tiles?"), ("xyzzy", None)])
def test_a_pin_that_nobody_offers(pin, fix):
    with pytest.raises(UsageError, match=f"no kernel is named '{pin}'") as error:
        check_pin(pin, {"tiles", "cpu_int4"}, "kernel")
    assert (error.value.known, error.value.fix) == (["cpu_int4", "tiles"], fix)
    check_pin(None, set(), "kernel")
    check_pin("tiles", {"tiles"}, "kernel")


def test_broken_kernels_refuse_with_their_cause():
    kernels = Kernels(known={"fast": FAST, "slow": SLOW}, broken={"lost": "no module lost"})
    choice = kernels.choose(1)
    assert choice.chosen is FAST
    assert choice.refusals == {"slow": SLOWER.format("fast", 10, -10), "lost": "no module lost"}
    assert Kernels(broken={"lost": "no module lost"}).choose(1).refusals == {"lost": "no module lost"}
    assert Kernels(known={"fast": FAST}, pin="reference").choose(1).chosen is None


def test_the_problem_of_a_matrix(make_matrix):
    matrix, _, _ = make_matrix(bits=4, rows=7, columns=64, group=32, order=True, even=False)
    assert Problem.of(matrix, torch.float16) == Problem(
        scheme=Scheme(code="uint", bits=4, group=32, act_order=True), rows=7, columns=64, dtype=torch.float16,
        device=torch.device("cpu"), even=False)
    assert Problem.of(make_matrix(rows=7, columns=4, scales="blocks")[0], torch.float16).scale_rows
