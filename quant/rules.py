"""The one matcher of layer names against a checkpoint's rules, with the semantics of each kind spelled out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..plugins.errors import CheckpointError

Kind = Literal["exact", "substring", "regex", "class"]


@dataclass(frozen=True)
class Rule:
    """One pattern and how it is meant.

    * exact: the layer itself, or a module the layer is inside ("model.layers.0" names all of that layer).
    * substring: found between dots of the name, whole parts only: "gate" names `mlp.gate`, not `mlp.gate_proj`.
    * regex: matches from the start of the name, as `re.match`.
    * class: every layer of that class; the only class there is here is "Linear".
    """

    pattern: str
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind == "regex":
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise CheckpointError("quantization config: a rule is no regular expression", found=self.pattern,
                                      fix=str(error)) from error

    def matches(self, name: str) -> bool:
        if self.kind == "exact":
            return name == self.pattern or name.startswith(f"{self.pattern}.")
        if self.kind == "substring":
            return f".{self.pattern}." in f".{name}."
        if self.kind == "class":
            return self.pattern == "Linear"
        return re.match(self.pattern, name) is not None


def first_match(rules: Iterable[Rule], name: str) -> Rule | None:
    """The first rule that names the layer."""
    return next((rule for rule in rules if rule.matches(name)), None)


def exact_rules(names: Iterable[str] | None) -> tuple[Rule, ...]:
    """`ignored_layers` of FP8 and `modules_to_not_convert` of transformers: full names."""
    return tuple(Rule(name, "exact") for name in names or ())


def substring_rules(names: Iterable[str] | None) -> tuple[Rule, ...]:
    """AWQ's `modules_to_not_convert`: parts of names."""
    return tuple(Rule(name, "substring") for name in names or ())


def target_rules(targets: Iterable[str] | None) -> tuple[Rule, ...]:
    """compressed-tensors' `targets` and `ignore`: "re:..." is a regex, "Linear" a class, anything else a name."""
    rules = []
    for target in targets or ():
        if target.startswith("re:"):
            rules.append(Rule(target[3:], "regex"))
        else:
            rules.append(Rule(target, "class" if target == "Linear" else "exact"))
    return tuple(rules)


@dataclass(frozen=True)
class Override:
    """One rule of GPTQ's `dynamic`: `changes` for layers it matches, None to leave them unquantized."""

    rule: Rule
    changes: tuple[tuple[str, Any], ...] | None


def dynamic_overrides(dynamic: Mapping[str, Mapping[str, Any]] | None) -> tuple[Override, ...]:
    """GPTQModel's `dynamic`: "-:regex" leaves a module unquantized, "+:regex" or "regex" changes its settings."""
    overrides = []
    for pattern, changes in (dynamic or {}).items():
        skip = pattern.startswith("-:")
        rule = Rule(pattern.removeprefix("-:").removeprefix("+:"), "regex")
        overrides.append(Override(rule, None if skip else tuple(sorted((changes or {}).items()))))
    return tuple(overrides)


def first_override(overrides: Iterable[Override], name: str) -> Override | None:
    """The first override that names the layer: later ones do not add to it."""
    return next((override for override in overrides if override.rule.matches(name)), None)
