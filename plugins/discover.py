"""Find plugins among the installed distributions, and examine one without touching anything shared."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError, did_you_mean
from .hookspecs import API_VERSION, GROUP, KINDS
from .log import get_logger
from .registry import COMMAND, TARGET

logger = get_logger(__name__)

# A plugin that calls sys.exit() is broken, not in charge; KeyboardInterrupt is the user's and passes.
FAILURES: tuple[type[BaseException], ...] = (Exception, SystemExit)
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("nybble_"))
BUILTIN = "builtin"
SLOW_IMPORT_SECONDS = 1.0
_NAME = re.compile(r"[^\s:=]+")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plugin that could be loaded: an entry point of a distribution, or a module given by the caller."""

    name: str
    module: str
    distribution: str | None
    version: str
    given: ModuleType | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of `nybble`: `target` "module:attribute" is called when it is chosen."""

    name: str
    help: str
    target: str
    plugin: str


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a plugin that passed every check brings.

    `claims` maps "kind:name" to "module:attribute"; `digest` covers version, bytes of the module, and claims.
    """

    module: ModuleType
    hooks: tuple[str, ...]
    claims: Mapping[str, str]
    commands: Mapping[str, Command]
    overrides: frozenset[str]
    digest: str


class Commands:
    """What `nybble_cli` is given to add commands to."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.added: dict[str, Command] = {}

    def add(self, name: str, help: str, target: str) -> None:
        """Add command `name` with a line of help. Raises PluginError unless target is "module:attribute"."""
        _check_row("nybble_cli", name, target)
        self.added[name] = Command(name=name, help=help, target=target, plugin=self.plugin)


def find(extra: Sequence[tuple[str, object]]) -> list[Candidate]:
    """Every plugin there is: built-ins first, then by name, whatever order the installation has.

    `extra` adds (name, module or namespace) pairs that are not installed.
    """
    found = []
    for point in metadata.entry_points(group=GROUP):
        owner, version = _describe(point.dist)
        found.append(Candidate(name=point.name, module=point.value, distribution=owner, version=version))
    for name, given in extra:
        module = given if isinstance(given, ModuleType) else _as_module(name, given)
        found.append(Candidate(name=name, module=module.__name__, distribution=None, given=module,
                               version=str(getattr(module, "__version__", "unknown"))))
    found.sort(key=lambda c: (c.name, c.distribution or "", c.module))
    return [_builtin(), *found]


def _builtin() -> Candidate:
    own = __name__.partition(".")[0]
    try:
        version = metadata.version(own)
    except metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    return Candidate(name=BUILTIN, module=f"{__package__}.builtin", distribution=own, version=version)


def _describe(dist: metadata.Distribution | None) -> tuple[str | None, str]:
    """A distribution's name and version; damaged metadata, where these are None or raise, is no obstacle."""
    try:
        return (dist.name, dist.version or "unknown") if dist else (None, "unknown")
    except Exception as exc:
        logger.debug("unreadable metadata in %s: %r", dist, exc)
        return None, "unknown"


def _as_module(name: str, namespace: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(vars(namespace))
    return module


def examine(candidate: Candidate, manager: pluggy.PluginManager) -> Contribution:
    """Import a plugin, hold it to the contract and collect what it brings.

    `manager` is fresh and thrown away afterwards, so that a plugin that fails half-way leaves nothing behind.
    Raises PluginError, or whatever the plugin's own code raises.
    """
    module = candidate.given or _import(candidate)
    _check_api(module)
    manager.register(module, candidate.name)
    hooks = _check_hooks(manager, module)
    claims = dict(_read_tables(manager))
    commands = Commands(candidate.name)
    manager.hook.nybble_cli(commands=commands)
    claims |= {f"{COMMAND}:{command.name}": command.target for command in commands.added.values()}
    return Contribution(module=module, hooks=hooks, claims=claims, commands=commands.added,
                        overrides=_read_overrides(module, claims), digest=_digest(candidate, module, claims))


def _import(candidate: Candidate) -> ModuleType:
    if not re.fullmatch(r"\w+(\.\w+)*", candidate.module):
        raise PluginError(f"the entry point of plugin {candidate.name!r} must name a module",
                          found=repr(candidate.module))
    logger.debug("importing plugin %s (%s)", candidate.name, candidate.module)
    had_torch, start = "torch" in sys.modules, time.perf_counter()
    module = import_module(candidate.module)
    seconds = time.perf_counter() - start
    heavy = "imports torch" if "torch" in sys.modules and not had_torch else None
    if heavy or seconds > SLOW_IMPORT_SECONDS:
        logger.warning("plugin %s %s: every start of nybble waits %.1f s for module %s; move the work to the "
                       "modules that its tables name", candidate.name, heavy or "is slow", seconds,
                       candidate.module)
    return module


def _check_api(module: ModuleType) -> None:
    stated = getattr(module, "NYBBLE_API", None)
    if stated is None:
        raise PluginError(f"module {module.__name__} does not state the plugin API it was written for",
                          fix=f"add NYBBLE_API = {API_VERSION} to it")
    if not (isinstance(stated, tuple) and len(stated) == 2 and all(type(part) is int for part in stated)):
        raise PluginError(f"NYBBLE_API of {module.__name__} must be (major, minor)", found=repr(stated),
                          fix=f"NYBBLE_API = {API_VERSION}")
    if stated[0] != API_VERSION[0] or stated[1] > API_VERSION[1]:
        theirs, ours = (".".join(map(str, version)) for version in (stated, API_VERSION))
        raise PluginError(
            f"module {module.__name__} was written for plugin API {theirs}; this nybble has {ours}",
            fix="upgrade the plugin, or install an older nybble" if stated < API_VERSION
            else "upgrade nybble, or install an older release of the plugin",
        )


def _check_hooks(manager: pluggy.PluginManager, module: ModuleType) -> tuple[str, ...]:
    """The hooks a module implements. What looks like a hook and is none would go unnoticed: it is refused."""
    implemented = manager.get_hookcallers(module) or []
    for caller in implemented:
        if not caller.has_spec():
            raise PluginError(f"there is no hook {caller.name!r}", known=HOOKS,
                              fix=did_you_mean(caller.name, HOOKS))
        if any(impl.wrapper or impl.hookwrapper for impl in caller.get_hookimpls()):
            raise PluginError(f"{caller.name} may not be a hook wrapper",
                              fix="a plugin states its own parts; NYBBLE_OVERRIDES replaces another's")
    names = tuple(sorted(caller.name for caller in implemented))
    unmarked = sorted(name for name in vars(module) if name in HOOKS and name not in names)
    if unmarked:
        raise PluginError(f"{', '.join(unmarked)} of module {module.__name__} is not marked as a hook",
                          fix="from nybble import hookimpl, and put @hookimpl above it")
    if not names:
        raise PluginError(f"module {module.__name__} implements no hook", known=HOOKS)
    return names


def _read_tables(manager: pluggy.PluginManager) -> Iterator[tuple[str, str]]:
    for hook, kind in KINDS.items():
        caller = getattr(manager.hook, hook)
        tables = caller()
        if len(tables) < len(caller.get_hookimpls()):  # pluggy drops None
            raise PluginError(f"{hook} returned None", fix='return {"name": "module:attribute"}')
        for table in tables:
            if not isinstance(table, dict):
                raise PluginError(f"{hook} must return a dict", found=repr(table)[:200],
                                  fix='return {"name": "module:attribute"}')
            for name, target in table.items():
                _check_row(hook, name, target)
                yield f"{kind}:{name}", target


def _check_row(hook: str, name: object, target: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(f"{hook}: a name is text without spaces, ':' and '='", found=repr(name))
    if not isinstance(target, str) or not TARGET.fullmatch(target):
        raise PluginError(f"{hook}: the place of {name!r} must be text of the form module:attribute",
                          found=repr(target)[:200])


def _read_overrides(module: ModuleType, claims: Mapping[str, str]) -> frozenset[str]:
    stated = getattr(module, "NYBBLE_OVERRIDES", ())
    if not isinstance(stated, (tuple, list)):
        raise PluginError('NYBBLE_OVERRIDES must be a tuple such as ("quant:awq",)', found=repr(stated)[:200])
    for key in stated:
        if key not in claims:
            raise PluginError(f"NYBBLE_OVERRIDES names {key!r}, which the plugin does not provide",
                              known=sorted(claims))
    return frozenset(stated)


def _digest(candidate: Candidate, module: ModuleType, claims: Mapping[str, str]) -> str:
    """Sixteen hex digits over what could differ between two processes that mean to run the same plugin."""
    file = getattr(module, "__file__", None)
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    parts = (candidate.version.encode(), content, repr(sorted(claims.items())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def new_manager(*, trace: bool) -> pluggy.PluginManager:
    """A pluggy manager that knows nybble's hooks; with `trace` it logs every call with its outcome."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if trace:
        manager.add_hookcall_monitoring(before=_trace_nothing, after=_trace_call)
    return manager


def _trace_nothing(hook: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
    """pluggy asks for both ends of a call; the far end knows everything."""


def _trace_call(outcome: pluggy.Result[Any], hook: str, impls: Sequence[pluggy.HookImpl],
                arguments: Mapping[str, Any]) -> None:
    if impls:
        result = outcome.exception or outcome.get_result()
        logger.info("hook %s of %s(%s) -> %r", hook, ", ".join(impl.plugin_name for impl in impls),
                    ", ".join(arguments), result)


def callers(manager: pluggy.PluginManager, hook: str) -> dict[str, Callable[..., list[Any]]]:
    """One callable per plugin that implements `hook`, so that a result or an error has a name on it."""
    plugins = {manager.get_name(p): p for p in manager.get_plugins()}
    found: dict[str, Callable[..., list[Any]]] = {}
    for impl in getattr(manager.hook, hook).get_hookimpls():
        others = [p for name, p in plugins.items() if name != impl.plugin_name]
        found[impl.plugin_name] = manager.subset_hook_caller(hook, others)
    return dict(sorted(found.items()))
