"""Who provides what: the claims of plugins on names, and the rule that settles two claims on one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .errors import PluginError, did_you_mean
from .hookspecs import KINDS

COMMAND = "command"
ALL_KINDS = (*KINDS.values(), COMMAND)
TARGET = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One plugin's offer of a part: where it is ("module:attribute") and whether it replaces another's."""

    target: str
    owner: str
    overrides: bool


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Every offer by key "kind:name", the winner first. Immutable: a plugin that is refused leaves no trace.

    `pins` are the user's choices, key -> plugin.
    """

    pins: Mapping[str, str] = field(default_factory=dict)
    offers: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def names(self, kind: str) -> list[str]:
        """The names of one kind, sorted."""
        assert kind in ALL_KINDS, f"no such kind: {kind}"
        return sorted(key.removeprefix(f"{kind}:") for key in self.offers if key.startswith(f"{kind}:"))

    def get(self, kind: str, name: str) -> Entry | None:
        """The offer that won, or None when nobody made one."""
        assert kind in ALL_KINDS, f"no such kind: {kind}"
        offers = self.offers.get(f"{kind}:{name}")
        return offers[0] if offers else None

    def contested(self) -> dict[str, tuple[Entry, ...]]:
        """The keys that several plugins offer, sorted."""
        return {key: offers for key, offers in sorted(self.offers.items()) if len(offers) > 1}

    def with_plugin(self, owner: str, claims: Mapping[str, str], overrides: Iterable[str]) -> Registry:
        """This registry with a plugin's claims added. Raises PluginError when one of them is another's."""
        offers = dict(self.offers)
        for key, target in claims.items():
            entry = Entry(target=target, owner=owner, overrides=key in overrides)
            offers[key] = self._settle(key, offers[key], entry) if key in offers else (entry,)
        return replace(self, offers=offers)

    def _settle(self, key: str, held: tuple[Entry, ...], new: Entry) -> tuple[Entry, ...]:
        """A pin decides; without one, a key has room for one plain offer and one that overrides it."""
        pin = self.pins.get(key)
        if pin is not None:
            return (new, *held) if pin == new.owner else (*held, new)
        for old in held:
            if old.overrides == new.overrides:
                does = "override" if new.overrides else "provide"
                raise PluginError(
                    f"plugins {old.owner!r} and {new.owner!r} both {does} {key}",
                    found=f"{old.owner}: {old.target}; {new.owner}: {new.target}",
                    fix=f"choose with --prefer {key}={old.owner} or --prefer {key}={new.owner}, or leave one "
                        "out with NYBBLE_PLUGINS; a plugin that means to replace a part says "
                        f'NYBBLE_OVERRIDES = ("{key}",)',
                )
        return (new, *held) if new.overrides else (*held, new)


def parse_pins(prefer: Sequence[str]) -> dict[str, str]:
    """["quant:awq=foo"] -> {"quant:awq": "foo"}. Raises PluginError on another form or kind, or a clash."""
    pins: dict[str, str] = {}
    for text in prefer:
        key, _, plugin = text.partition("=")
        kind, _, name = key.partition(":")
        if not (kind and name and plugin):
            raise PluginError(f"--prefer {text!r} is not of the form kind:name=plugin",
                              fix="--prefer quant:awq=foo")
        if kind not in ALL_KINDS:
            raise PluginError(f"--prefer {text}: there is no kind {kind!r}", known=ALL_KINDS,
                              fix=did_you_mean(kind, ALL_KINDS))
        if pins.setdefault(key, plugin) != plugin:
            raise PluginError(f"--prefer chooses two plugins for {key}", found=f"{pins[key]} and {plugin}")
    return pins
