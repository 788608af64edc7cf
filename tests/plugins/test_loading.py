"""What loads, what is left out and why: one broken plugin must not cost the others anything."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nybble.plugins import discover
from nybble.plugins.errors import PluginError
from nybble.plugins.manager import PluginHost, PluginInfo

HEAD = "from nybble import hookimpl\nNYBBLE_API = (1, 0)\n"


def quants(rows: str) -> str:
    return f"@hookimpl\ndef nybble_proposers(): return {rows}\n"


GOOD = HEAD + quants("{'good': 'plug_good_method:Method'}")
# What a plugin registers before it breaks; none of it may stay behind.
BEFORE = HEAD + quants("{'leak': 'json:dumps'}") + "@hookimpl\ndef nybble_step_done(stats): ...\n"

BROKEN = {
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits at import": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "needs what is not installed": ("import no_such_module", "No module named 'no_such_module'"),
    "syntax error": ("def", "SyntaxError"),
    "no API": ("from nybble import hookimpl\n" + quants("{}"), "add NYBBLE_API = (1, 0)"),
    "older API": ("NYBBLE_API = (0, 9)", "upgrade the plugin"),
    "newer API": ("NYBBLE_API = (2, 0)", "for plugin API 2.0; this nybble has 1.0"),
    "newer minor API": ("NYBBLE_API = (1, 1)", "upgrade nybble"),
    "API as text": ("NYBBLE_API = '1.0'", "must be (major, minor)"),
    "no hook": ("NYBBLE_API = (1, 0)", "implements no hook"),
    "misspelt hook": (BEFORE + "@hookimpl\ndef nybble_modles(): return {}", "did you mean nybble_models?"),
    "unmarked hook": (BEFORE + "def nybble_models(): return {}", "nybble_models of module plug_bad is not"),
    "unknown argument": (BEFORE + "@hookimpl\ndef nybble_models(config): return {}", "can not be found"),
    "wrapper": (BEFORE + "@hookimpl(wrapper=True)\ndef nybble_models(): return (yield)", "may not be a"),
    "hook raises": (BEFORE + "@hookimpl\ndef nybble_models(): raise OSError('boom')", "OSError: boom"),
    "hook exits": (BEFORE + "@hookimpl\ndef nybble_models(): raise SystemExit(1)", "SystemExit: 1"),
    "hook returns nothing": (BEFORE + "@hookimpl\ndef nybble_models(): ...", "nybble_models returned None"),
    "table is a list": (BEFORE + "@hookimpl\ndef nybble_models(): return ['A']", "must return a dict"),
    "place without colon": (BEFORE + "@hookimpl\ndef nybble_models(): return {'A': 'm'}", "module:attribute"),
    "place is the class": (BEFORE + "@hookimpl\ndef nybble_models(): return {'A': dict}", "module:attribute"),
    "name with a space": (BEFORE + "@hookimpl\ndef nybble_models(): return {'A b': 'm:A'}", "a name is text"),
    "command without place": (BEFORE + "@hookimpl\ndef nybble_cli(commands): commands.add('x', 'y', 'z')",
                              "module:attribute"),
    "overrides what it lacks": (BEFORE + "NYBBLE_OVERRIDES = ('model:A',)", "which the plugin does not"),
    "overrides as text": (BEFORE + "NYBBLE_OVERRIDES = 'proposer:leak'", "must be a tuple"),
    "takes a built-in's name": (BEFORE + "@hookimpl\ndef nybble_loaders(): return {'dummy': 'm:A'}",
                                "plugins 'builtin' and 'bad' both provide loader:dummy"),
}


def info(host: PluginHost, name: str) -> PluginInfo:
    return next(p for p in host.plugins if p.name == name)


def test_a_good_plugin(site):
    site.add("good", GOOD, version="2.1")
    (site.path / "plug_good_method.py").write_text("class Method: ...\n")
    host = PluginHost.load()
    assert [p.name for p in host.plugins] == ["builtin", "good"]
    good = info(host, "good")
    assert (good.status, good.version, good.module) == ("loaded", "2.1", "plug_good")
    assert (good.provides, good.hooks) == (("proposer:good",), ("nybble_proposers",))
    assert good.distribution == "nybble-good"
    assert good.reason is None and 0 < good.load_seconds < 10
    assert host.names("proposer") == ["good"] and host.owner("proposer", "good") == "good"
    assert "plug_good_method" not in sys.modules, "a table must not import what it names"
    assert host.resolve("proposer", "good") is sys.modules["plug_good_method"].Method


@pytest.mark.parametrize("source, reason", BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_left_out_whole(site, caplog, source, reason):
    site.add("bad", source)
    site.add("good", GOOD)
    host = PluginHost.load()
    bad = info(host, "bad")
    assert bad.status == "failed" and reason in bad.reason and bad.traceback.startswith("Traceback")
    assert host.names("proposer") == ["good"] and host.step_done is None
    assert info(host, "good").status == "loaded"
    assert [r.levelname for r in caplog.records if "plugin bad 1.0 is left out" in r.message] == ["WARNING"]
    with pytest.raises(PluginError, match=r"--strict-plugins(.|\n)*bad: "):
        PluginHost.load(strict=True)


def test_ctrl_c_is_the_users(site):
    site.add("bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        PluginHost.load()


@pytest.mark.parametrize("value, reason", [("plug_bad:Plugin", "must name a module"),
                                           ("no_such_module", "No module named")])
def test_an_entry_point_that_leads_nowhere(site, value, reason):
    site.add("bad", GOOD, value=value)
    assert reason in info(PluginHost.load(), "bad").reason


def test_two_distributions_with_one_plugin_name(site):
    site.add("good", GOOD)
    other = site.path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: zz-other\nVersion: 9\n")
    (other / "entry_points.txt").write_text("[nybble]\ngood = plug_good\nalso = plug_good\n")
    host = PluginHost.load()
    found = [(p.name, p.version, p.status, p.cause) for p in host.plugins[1:]]
    assert found == [
        ("also", "9", "loaded", ""),
        ("good", "1.0", "failed", "module plug_good is already loaded as plugin 'also'"),
        ("good", "9", "failed", "module plug_good is already loaded as plugin 'also'"),
    ]
    host = PluginHost.load(allow="good")
    assert [(p.name, p.version, p.status) for p in host.plugins[2:]] == [("good", "1.0", "loaded"),
                                                                         ("good", "9", "failed")]
    assert host.plugins[3].cause == "two plugins are named 'good'"


def test_damaged_metadata_costs_only_the_version(site):
    site.add("good", GOOD)
    (site.path / "nybble_good-1.0.dist-info" / "METADATA").unlink()
    good = info(PluginHost.load(), "good")
    assert (good.status, good.version, good.distribution) == ("loaded", "unknown", None)


@pytest.mark.parametrize("allow, loaded", [
    (None, ["builtin", "a", "b"]),
    ("", ["builtin"]),
    (" b ,", ["builtin", "b"]),
    ("builtin,a", ["builtin", "a"]),
])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_allow_list(site, monkeypatch, allow, loaded, by):
    site.add("a", HEAD + quants("{'a': 'm:A'}"))
    site.add("b", HEAD + quants("{'b': 'm:B'}"))
    if by == "environment" and allow is not None:
        monkeypatch.setenv("NYBBLE_PLUGINS", allow)
    host = PluginHost.load(allow=allow if by == "argument" else None)
    status = {p.name: p.status for p in host.plugins}
    assert status == {n: "loaded" if n in loaded else "blocked" for n in ("builtin", "a", "b")}
    assert {f"plug_{n}" in sys.modules for n, s in status.items() if s == "blocked"} <= {False}


def test_an_unknown_name_in_the_allow_list(site):
    site.add("awq_fast", GOOD)
    with pytest.raises(PluginError, match=r"'awq_fats'(.|\n)*did you mean awq_fast\?"):
        PluginHost.load(allow="awq_fats")


def test_a_heavy_plugin_is_told_so(site, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.delitem(sys.modules, "torch")
    site.add("heavy", "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n" + GOOD)
    site.add("slow", HEAD + quants("{'slow': 'm:A'}"))
    PluginHost.load()
    assert "plugin heavy imports torch" in caplog.text and "plugin slow" not in caplog.text
    monkeypatch.setattr(discover, "SLOW_IMPORT_SECONDS", -1.0)
    del sys.modules["plug_slow"]
    PluginHost.load()
    assert "plugin slow is slow" in caplog.text


def test_trace(site, caplog, monkeypatch):
    site.add("good", GOOD)
    monkeypatch.setenv("NYBBLE_TRACE_PLUGINS", "1")
    host = PluginHost.load()
    assert "hook nybble_proposers of good() -> [{'good': 'plug_good_method:Method'}]" in caplog.text
    host.detect_quant({}, [])
    assert "nybble_detect_quant" not in caplog.text, "nobody implements it"


CHILD = """
import json, sys, time
from nybble.plugins.manager import PluginHost
start = time.process_time()
host = PluginHost.load()
seconds = time.process_time() - start
try:
    host.check(json.loads(sys.argv[1]))
    said = ""
except Exception as error:
    said = f"{type(error).__name__} {error}"
print(json.dumps({"seconds": seconds, "torch": "torch" in sys.modules, "said": said}))
"""


def test_another_process(site, monkeypatch):
    """A worker loads the host quickly, without torch, and refuses plugins that are not its parent's."""
    site.add("good", GOOD)
    fingerprint = PluginHost.load().fingerprint()
    assert len(fingerprint) == 2 and fingerprint[1].startswith("good 1.0 ")
    source = str(Path(discover.__file__).absolute().parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{site.path}:{source}")

    def child() -> dict:
        done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(fingerprint)], capture_output=True,
                              text=True, check=True)
        return json.loads(done.stdout)

    same = child()
    assert same["said"] == "" and not same["torch"] and same["seconds"] < 0.06
    site.path.joinpath("plug_good.py").write_text(GOOD + "# edited\n")
    assert "PluginError this worker process does not have" in (said := child()["said"])
    assert f"only in the parent: {fingerprint[1]}; only here: good 1.0 " in said
    site.path.joinpath("plug_good.py").write_text("1 / 0")
    assert "good failed here: ZeroDivisionError" in child()["said"]
