"""Rules against layer names: each kind matches what it says and not its neighbours."""

from __future__ import annotations

import pytest

from nybble.plugins.errors import CheckpointError
from nybble.quant.rules import (
    Rule,
    dynamic_overrides,
    exact_rules,
    first_match,
    first_override,
    substring_rules,
    target_rules,
)

GATE, PROJ, HEAD = "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "lm_head"


@pytest.mark.parametrize("kind, pattern, matched", [
    ("exact", GATE, {GATE}),
    ("exact", "model.layers.1", {GATE, PROJ}),
    ("exact", "model.layers.1.mlp.gat", set()),
    ("exact", "layers.1", set()),
    ("substring", "gate", {GATE}),
    ("substring", "mlp.gate_proj", {PROJ}),
    ("substring", "lm_head", {HEAD}),
    ("substring", "layers.1.mlp", {GATE, PROJ}),
    ("substring", "ayers", set()),
    ("regex", r".*gate", {GATE, PROJ}),
    ("regex", r".*gate$", {GATE}),
    ("regex", r"gate", set()),
    ("class", "Linear", {GATE, PROJ, HEAD}),
    ("class", "Conv2d", set()),
])  # fmt: skip
def test_kinds(kind, pattern, matched):
    assert {name for name in (GATE, PROJ, HEAD) if Rule(pattern, kind).matches(name)} == matched


def test_bad_regex_is_refused():
    with pytest.raises(CheckpointError, match=r"no regular expression\n.*\("):
        Rule("(", "regex")


@pytest.mark.parametrize("read, names, rules", [
    (exact_rules, None, ()),
    (exact_rules, ["a.b"], (Rule("a.b", "exact"),)),
    (substring_rules, ["gate"], (Rule("gate", "substring"),)),
    (target_rules, ["Linear", "re:.*q$", "lm_head"],
     (Rule("Linear", "class"), Rule(".*q$", "regex"), Rule("lm_head", "exact"))),
])  # fmt: skip
def test_spellings(read, names, rules):
    assert read(names) == rules


def test_first_rule_wins():
    rules = target_rules(["lm_head", "Linear"])
    assert first_match(rules, HEAD) is rules[0]
    assert first_match(rules, GATE) is rules[1]
    assert first_match(rules[:1], GATE) is None


def test_dynamic():
    overrides = dynamic_overrides({r"-:.*\.gate$": {}, r"+:.*\.gate": {"bits": 8}, r".*mlp": {"sym": False}, "lm": {}})
    assert [first_override(overrides, name) for name in (GATE, PROJ, "x.mlp.up")] == list(overrides[:3])
    assert [override.changes for override in overrides] == [None, (("bits", 8),), (("sym", False),), ()]
    assert first_override(overrides, "model.norm") is None
    assert dynamic_overrides(None) == ()
