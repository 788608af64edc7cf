"""Plugins to try the host on: hand-written distributions on sys.path, and namespaces that need no files."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble import hookimpl
from nybble.plugins.hookspecs import KINDS


class Site:
    """A folder of installed distributions, as pip leaves them: modules and *.dist-info."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, source: str, *, version: str = "1.0", value: str | None = None) -> None:
        """Install module `plug_NAME` and register it as entry point NAME (or `value` in its place)."""
        (self.path / f"plug_{name}.py").write_text(source)
        info = self.path / f"nybble_{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nybble-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[nybble]\n{name} = {value or f'plug_{name}'}\n")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Site(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def quiet_world(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No NYBBLE_* of the caller's, and a log that caplog can read, whatever an entry point makes of it."""
    for name in ("NYBBLE_PLUGINS", "NYBBLE_TRACE_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("nybble"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("nybble"), "handlers", [])
    caplog.set_level(logging.INFO, logger="nybble")


def make_namespace(*keys: str, overrides: tuple[str, ...] = (), target: str = "json:dumps",
                   **hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin that provides `keys` ("proposer:awq"), all at `target`, and implements `hooks`."""
    tables: dict[str, dict[str, str]] = {}
    for key in keys:
        kind, _, name = key.partition(":")
        hook = next(h for h, k in KINDS.items() if k == kind)
        tables.setdefault(hook, {})[name] = target
    for hook, rows in tables.items():
        hooks[hook] = lambda rows=rows: rows
    plugin = SimpleNamespace(NYBBLE_API=(1, 0), NYBBLE_OVERRIDES=overrides)
    for hook, function in hooks.items():
        setattr(plugin, hook, hookimpl(function))
    return plugin


@pytest.fixture
def namespace() -> Callable[..., SimpleNamespace]:
    return make_namespace
