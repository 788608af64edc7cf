"""The plugin host: load what is installed, leave out what is broken and say why, resolve parts by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from traceback import format_exception
from typing import Any, Literal

from . import env
from .discover import BUILTIN, FAILURES, Candidate, Command, Contribution, callers, examine, find, new_manager
from .errors import PluginError, did_you_mean
from .hookspecs import Claim
from .log import get_logger
from .registry import COMMAND, Entry, Registry, parse_pins

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What became of one plugin. `provides` holds "kind:name"; `reason` and `traceback` are of a failure."""

    name: str
    version: str
    module: str
    distribution: str | None
    status: Literal["loaded", "failed", "blocked"]
    reason: str | None = None
    traceback: str | None = None
    provides: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    load_seconds: float = 0.0
    digest: str = ""

    @property
    def cause(self) -> str:
        """The first line of the reason."""
        return (self.reason or "").partition("\n")[0]


class PluginHost:
    """Every plugin of this process, and the parts they provide. Made by `load`, once, at start-up.

    Attributes:
        plugins: built-ins first, then by name.
    """

    def __init__(self, *, pins: dict[str, str], strict: bool, trace: bool) -> None:
        self.plugins: tuple[PluginInfo, ...] = ()
        self._strict, self._trace = strict, trace
        self._manager = new_manager(trace=trace)
        self._contributions: dict[str, Contribution] = {}
        self._registry = Registry(pins=pins)
        self._resolved: dict[str, Any] = {}

    @classmethod
    def load(cls, *, allow: str | None = None, prefer: Sequence[str] = (), strict: bool = False,
             extra: Sequence[tuple[str, object]] = ()) -> PluginHost:
        """Load the built-ins and every permitted plugin.

        Args:
            allow: "a,b" loads those, "" the built-ins only; None does what NYBBLE_PLUGINS says (unset: all).
            prefer: choices between plugins, "kind:name=plugin".
            strict: a plugin that fails is an error, not a line in the list.
            extra: (name, module or namespace) of plugins that are not installed, for tests and notebooks;
                worker processes do not have them.

        Raises PluginError for an unknown name in `allow` or `prefer`, and for any failure under `strict`.
        """
        host = cls(pins=parse_pins(prefer), strict=strict, trace=env.read_flag("NYBBLE_TRACE_PLUGINS"))
        candidates = find(extra)
        permitted = _permitted(candidates, env.read_str("NYBBLE_PLUGINS") if allow is None else allow)
        for candidate in candidates:
            if candidate.name in permitted:
                host.plugins += (host._admit(candidate),)
            else:
                host.plugins += (_info(candidate, "blocked", reason="NYBBLE_PLUGINS does not name it"),)
        if strict and (failed := host._with_status("failed")):
            raise PluginError(f"{len(failed)} plugin(s) failed, and --strict-plugins makes that fatal",
                              found="; ".join(f"{p.name}: {p.cause}" for p in failed),
                              fix=f"nybble plugins show {failed[0].name}")
        host._check_pins()
        for key, (winner, *rest) in host._registry.contested().items():
            logger.warning("%s comes from plugin %s instead of %s (%s)", key, winner.owner,
                           ", ".join(e.owner for e in rest), "--prefer" if key in host._registry.pins
                           else "its NYBBLE_OVERRIDES")
        return host

    def _admit(self, candidate: Candidate) -> PluginInfo:
        """Examine one plugin and add it, or record why not. Nothing shared changes until nothing can fail."""
        start, brought = time.perf_counter(), None
        try:
            if candidate.name in self._contributions:
                raise PluginError(f"two plugins are named {candidate.name!r}", fix="uninstall one of them")
            brought = examine(candidate, new_manager(trace=self._trace))
            if other := self._manager.get_name(brought.module):
                raise PluginError(f"module {candidate.module} is already loaded as plugin {other!r}")
            registry = self._registry.with_plugin(candidate.name, brought.claims, brought.overrides)
            self._manager.register(brought.module, candidate.name)
        except FAILURES as exc:
            info = _info(candidate, "failed", reason=_cause(exc), traceback="".join(format_exception(exc)))
            logger.warning("plugin %s %s is left out: %s (nybble plugins show %s)", info.name, info.version,
                           info.cause, info.name)
        else:
            info = _info(candidate, "loaded")
            self._registry, self._contributions[candidate.name] = registry, brought
        if brought:
            info = replace(info, provides=tuple(sorted(brought.claims)), hooks=brought.hooks,
                           digest=brought.digest)
        return replace(info, load_seconds=time.perf_counter() - start)

    def _check_pins(self) -> None:
        """A plugin chosen by name must be there, and provide what it was chosen for."""
        infos = {p.name: p for p in self.plugins}
        for key, name in self._registry.pins.items():
            asked = f"--prefer {key}={name}"
            if name not in infos:
                raise PluginError(f"{asked}: there is no plugin {name!r}", known=infos,
                                  fix=did_you_mean(name, infos))
            if infos[name].status != "loaded":
                raise PluginError(f"{asked}: plugin {name!r} is {infos[name].status}",
                                  found=infos[name].reason)
            offers = self._registry.offers.get(key, ())
            if name not in [offer.owner for offer in offers]:
                keys = self._contributions[name].claims
                raise PluginError(f"{asked}: plugin {name!r} does not provide {key}", known=sorted(keys),
                                  fix=did_you_mean(key, keys))

    def _with_status(self, status: str) -> list[PluginInfo]:
        return [p for p in self.plugins if p.status == status]

    def names(self, kind: str) -> list[str]:
        """The names of every part of a kind ("model", "quant", ...), sorted."""
        return self._registry.names(kind)

    def owner(self, kind: str, name: str) -> str:
        """The plugin that provides a part. Raises PluginError for an unknown name."""
        return self._entry(kind, name).owner

    def resolve(self, kind: str, name: str) -> Any:
        """The part itself, imported on first use.

        Raises PluginError for an unknown name, listing the plugins that failed, and for a part that cannot be
        imported.
        """
        entry, key = self._entry(kind, name), f"{kind}:{name}"
        if key not in self._resolved:
            module, _, attribute = entry.target.partition(":")
            try:
                self._resolved[key] = attrgetter(attribute)(import_module(module))
            except FAILURES as exc:
                raise PluginError(f"{key} of plugin {entry.owner!r} cannot be imported from {entry.target}",
                                  found=_cause(exc), fix=self._way_out(entry.owner)) from exc
        return self._resolved[key]

    def _entry(self, kind: str, name: str) -> Entry:
        entry = self._registry.get(kind, name)
        if entry is None:
            raise self._unknown(kind, name)
        return entry

    def _unknown(self, kind: str, name: str) -> PluginError:
        """Nobody provides it. Perhaps a broken or blocked plugin would have, so all of those are named."""

        def likely(info: PluginInfo) -> bool:
            return f"{kind}:{name}" in info.provides or name.lower() in f"{info.name} {info.module}".lower()

        absent = sorted((p for p in self.plugins if p.status != "loaded"), key=lambda p: not likely(p))
        known = self.names(kind)
        fix = did_you_mean(name, known)
        if absent and likely(suspect := absent[0]):
            fix = (f"add it to NYBBLE_PLUGINS: {suspect.name}" if suspect.status == "blocked" else
                   f"mend plugin {suspect.name!r}; `nybble plugins show {suspect.name}` says more")
        return PluginError(
            f"no {kind.replace('_', ' ')} is named {name!r}",
            found="; ".join(f"plugin {p.name!r} is {p.status}: {p.cause}" for p in absent) or None,
            known=known,
            fix=fix or "install a plugin that provides it",
        )

    def _way_out(self, plugin: str) -> str:
        if plugin == BUILTIN:
            return "it is part of nybble: repair the installation"
        others = ",".join(name for name in self._contributions if name not in (plugin, BUILTIN))
        return f'repair or upgrade plugin {plugin!r}, or leave it out with NYBBLE_PLUGINS="{others}"'

    def _each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of every plugin that implements `hook` and has something to say.

        A plugin gets its own copy of a dict: what it writes there must not change what the next one sees.
        """
        for plugin, call in callers(self._manager, hook).items():
            own = {name: deepcopy(arg) if isinstance(arg, dict) else arg for name, arg in arguments.items()}
            try:
                results = call(**own)
            except FAILURES as exc:
                raise PluginError(f"{hook} of plugin {plugin!r} failed", found=_cause(exc),
                                  fix=self._way_out(plugin)) from exc
            for result in results:
                yield plugin, result

    def detect_quant(self, hf_config: dict[str, Any], files: Sequence[str]) -> Claim | None:
        """The claim on a checkpoint, or None. Raises PluginError when plugins claim different methods."""
        claims = list(self._each("nybble_detect_quant", hf_config=hf_config, files=tuple(files)))
        for plugin, claim in claims:
            if not isinstance(claim, Claim):
                raise PluginError(f"nybble_detect_quant of plugin {plugin!r} must return a Claim or None",
                                  found=repr(claim)[:200], fix=self._way_out(plugin))
        if len({claim.name for _, claim in claims}) > 1:
            raise PluginError(
                "plugins do not agree on how this checkpoint is quantized",
                found="; ".join(f"{plugin!r} says {claim.name} ({claim.reason})" for plugin, claim in claims),
                fix="say which with --quantization",
            )
        return claims[0][1] if claims else None

    def configure(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config` ({setting: value}) with every plugin's changes.

        Raises PluginError for a field that `config` does not have and for two plugins that disagree on one.
        """
        changes: dict[str, tuple[str, Any]] = {}
        for plugin, wanted in self._each("nybble_configure", config=config):
            if not isinstance(wanted, dict):
                raise PluginError(f"nybble_configure of plugin {plugin!r} must return a dict or None",
                                  found=repr(wanted)[:200], fix=self._way_out(plugin))
            for name, value in wanted.items():
                if name not in config:
                    raise PluginError(f"plugin {plugin!r} changes the setting {name!r}, which does not exist",
                                      fix=did_you_mean(name, config) or self._way_out(plugin))
                first, agreed = changes.setdefault(name, (plugin, value))
                if agreed != value:
                    raise PluginError(f"plugins {first!r} and {plugin!r} disagree on the setting {name!r}",
                                      found=f"{agreed!r} and {value!r}", fix=self._way_out(plugin))
        for name, (plugin, value) in changes.items():
            logger.info("plugin %s sets %s: %r -> %r", plugin, name, config[name], value)
        return config | {name: value for name, (_, value) in changes.items()}

    @property
    def step_done(self) -> Callable[[Any], None] | None:
        """Tell every observer about a step; None when there is none. Read it once, call it per step.

        An observer that raises is told nothing more, and the engine goes on (under `strict`: PluginError).
        """
        observers = callers(self._manager, "nybble_step_done")

        def notify(stats: Any) -> None:
            for plugin, call in list(observers.items()):
                try:
                    call(stats=stats)
                except FAILURES as exc:
                    del observers[plugin]
                    logger.exception("nybble_step_done of plugin %s failed; it is not called again", plugin)
                    if self._strict:
                        raise PluginError(f"nybble_step_done of plugin {plugin!r} failed", found=_cause(exc),
                                          fix=self._way_out(plugin)) from exc

        return notify if observers else None

    def cli_commands(self) -> list[Command]:
        """The subcommands of `nybble` that plugins add; `resolve("command", name)` gives the function."""
        return [self._contributions[self.owner(COMMAND, name)].commands[name] for name in self.names(COMMAND)]

    def add_routes(self, app: Any) -> None:
        """Let plugins call `app.add_route(path, handler, methods)`. Raises PluginError when one fails."""
        for plugin, result in self._each("nybble_routes", app=app):
            logger.debug("nybble_routes of plugin %s returned %r, which nobody reads", plugin, result)

    def fingerprint(self) -> tuple[str, ...]:
        """What processes must share: "name version digest" of each plugin, and who won each conflict."""
        loaded = [f"{p.name} {p.version} {p.digest}" for p in self._with_status("loaded")]
        chosen = [f"{key} from {offers[0].owner}" for key, offers in self._registry.contested().items()]
        return tuple(sorted(loaded + chosen))

    def check(self, fingerprint: Sequence[str]) -> None:
        """Raise PluginError unless this process has the plugins of the one that made `fingerprint`.

        An empty one was never taken (a config made by hand) and matches.
        """
        there, here = set(fingerprint), set(self.fingerprint())
        if there and there != here:
            raise PluginError(
                "this worker process does not have the plugins of its parent",
                found=f"only in the parent: {', '.join(sorted(there - here)) or 'nothing'}; "
                      f"only here: {', '.join(sorted(here - there)) or 'nothing'}"
                      + "".join(f"; {p.name} failed here: {p.cause}" for p in self._with_status("failed")),
                fix="give both the same installed plugins, NYBBLE_PLUGINS and --prefer, and restart",
            )

    def unregister(self, name: str) -> None:
        """Take a loaded plugin out, for tests and notebooks; what it had overridden comes back."""
        if name not in self._contributions:
            raise PluginError(f"no plugin {name!r} is loaded", known=self._contributions,
                              fix=did_you_mean(name, self._contributions))
        self._manager.unregister(name=name)
        del self._contributions[name]
        self.plugins = tuple(p for p in self.plugins if p.name != name or p.status != "loaded")
        registry = Registry(pins=self._registry.pins)
        for owner, brought in self._contributions.items():
            registry = registry.with_plugin(owner, brought.claims, brought.overrides)
        self._registry = registry
        self._resolved.clear()


def _permitted(candidates: Sequence[Candidate], allow: str | None) -> set[str]:
    known = {c.name for c in candidates}
    if allow is None:
        return known
    wanted = {name.strip() for name in allow.split(",") if name.strip()}
    for name in sorted(wanted - known):
        raise PluginError(f"NYBBLE_PLUGINS names the plugin {name!r}, which is not installed",
                          known=sorted(known), fix=did_you_mean(name, known))
    return wanted | {BUILTIN}


def _info(candidate: Candidate, status: Literal["loaded", "failed", "blocked"], *, reason: str | None = None,
          traceback: str | None = None) -> PluginInfo:
    return PluginInfo(name=candidate.name, version=candidate.version, module=candidate.module, status=status,
                      distribution=candidate.distribution, reason=reason, traceback=traceback)


def _cause(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, PluginError) else f"{type(exc).__name__}: {exc}"
