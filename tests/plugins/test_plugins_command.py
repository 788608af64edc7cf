"""`nybble plugins list | show`."""

from __future__ import annotations

import argparse
import json

import pytest

from nybble.engine.cli import plugins as cli
from nybble.plugins.errors import PluginError, UsageError

GOOD = ("from nybble import hookimpl\nNYBBLE_API = (1, 0)\n"
        "@hookimpl\ndef nybble_proposers(): return {'[bold]': 'json:dumps'}\n")


@pytest.fixture
def run(site, capsys):
    """run("list", "--json") -> (exit code, what was printed), with a good, a broken and a blocked plugin."""
    site.add("good", GOOD, version="2.0")
    site.add("broken", "1 / 0")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def call(*words: str) -> tuple[int, str]:
        return cli.run(parser.parse_args(words)), capsys.readouterr().out

    return call


def test_list(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, text = run("list")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1].strip()}
    assert code == 0 and rows["good"][:3] == ["2.0", "loaded", "proposer:[bold]"] and float(rows["good"][3]) > 0
    assert rows["builtin"][1] == "loaded" and "loader:dummy" in text
    assert "broken 1.0 failed: ZeroDivisionError: division by zero" in text


def test_list_as_json(run):
    code, text = run("list", "--json")
    found = {info["name"]: info for info in json.loads(text)}
    assert code == 0 and [*found] == ["builtin", "broken", "good"]
    assert found["good"] | {"load_seconds": 0, "digest": ""} == {
        "name": "good", "version": "2.0", "module": "plug_good", "distribution": "nybble-good",
        "status": "loaded", "reason": None, "traceback": None, "provides": ["proposer:[bold]"],
        "hooks": ["nybble_proposers"], "load_seconds": 0, "digest": ""}
    assert "1 / 0" in found["broken"]["traceback"]


@pytest.mark.parametrize("words, names", [
    (("list", "--hook", "nybble_proposers"), ["good"]),
    (("list", "--hook", "nybble_loaders"), ["builtin"]),
    (("list", "--hook", "nybble_routes"), []),
    (("show", "broken"), ["broken"]),
])
def test_choosing(run, words, names):
    assert [info["name"] for info in json.loads(run(*words, "--json")[1])] == names


def test_show(run, monkeypatch):
    code, text = run("show", "good")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    assert code == 0 and lines["plugin"].strip() == "good 2.0" and lines["package"].strip() == "nybble-good"
    assert lines["provides"].strip() == "proposer:[bold]" and len(lines["digest"].strip()) == 16
    code, text = run("show", "broken")
    assert code == 0 and "reason:    ZeroDivisionError" in text and "Traceback (most recent" in text
    monkeypatch.setenv("NYBBLE_PLUGINS", "good")
    assert "status:    blocked" in run("show", "broken")[1]


def test_an_overridden_part_names_the_winner(run, site):
    site.add("mine", GOOD + "NYBBLE_OVERRIDES = ('proposer:[bold]',)")
    assert "proposer:[bold] (overridden by mine)" in run("show", "good")[1]
    assert "overridden" not in run("show", "mine")[1]
    assert "proposer:[bold] (overridden by good)" in run("show", "mine", "--prefer", "proposer:[bold]=good")[1]


@pytest.mark.parametrize("words, code", [(["list"], 6), (["show", "broken"], 6), (["show", "good"], 0)])
def test_strict(run, words, code):
    assert run(*words, "--strict-plugins")[0] == code


@pytest.mark.parametrize("words, error, said", [
    (("show", "goood"), PluginError, "did you mean good?"),
    (("list", "--hook", "nybble_quant"), UsageError, "did you mean nybble_quants?"),
    (("list", "--prefer", "proposer:x=nobody"), PluginError, "there is no plugin 'nobody'"),
])
def test_mistakes(run, words, error, said):
    with pytest.raises(error) as raised:
        run(*words)
    assert said in str(raised.value)
