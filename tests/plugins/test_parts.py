"""Using what plugins bring: parts by name, claims on a checkpoint, settings, observers, commands, routes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nybble.plugins.errors import PluginError
from nybble.plugins.hookspecs import Claim
from nybble.plugins.manager import PluginHost


def load(*plugins: tuple[str, object], **options: object) -> PluginHost:
    return PluginHost.load(extra=plugins, **options)


def boom(**_: object) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("asked, said", [
    ("awqq", ["no proposer is named 'awqq'", "known: awq", "did you mean awq?"]),
    ("gptq", ["no proposer is named 'gptq'", "'my_gptq' is failed: nybble_proposers:", "mend plugin 'my_gptq'"]),
    ("mxfp4", ["'twin' is failed: plugins 'awq_fast' and 'twin' both provide", "mend plugin 'twin'"]),
    ("int3", ["plugin 'int3' is blocked: NYBBLE_PLUGINS does not name it", "add it to NYBBLE_PLUGINS"]),
    ("qqqqqq", ["my_gptq", "twin", "int3", "fix:   install a plugin that provides it"]),
])
def test_an_unknown_name_says_who_might_have_had_it(namespace, asked, said):
    host = load(("awq_fast", namespace("proposer:awq")), ("my_gptq", namespace("proposer:gptq", target="no colon")),
                ("twin", namespace("proposer:awq", "proposer:mxfp4")), ("int3", namespace("proposer:int3")),
                allow="awq_fast,my_gptq,twin")
    for ask in (host.resolve, host.owner):
        with pytest.raises(PluginError) as error:
            ask("proposer", asked)
        assert [s for s in said if s not in str(error.value)] == []


@pytest.mark.parametrize("target, cause", [
    ("no_such_module:A", "No module named 'no_such_module'"),
    ("json:Nothing", "module 'json' has no attribute 'Nothing'"),
    ("plug_exits:A", "SystemExit: 7"),
    ("plug_raises:A", "ZeroDivisionError"),
])
def test_a_part_that_cannot_be_imported(site, namespace, target, cause):
    (site.path / "plug_exits.py").write_text("raise SystemExit(7)")
    (site.path / "plug_raises.py").write_text("1 / 0")
    host = load(("bad", namespace("model:A", target=target)), ("other", namespace("proposer:x")))
    with pytest.raises(PluginError) as error:
        host.resolve("model", "A")
    assert f"model:A of plugin 'bad' cannot be imported from {target}" in str(error.value)
    assert cause in error.value.found and error.value.fix.endswith('leave it out with NYBBLE_PLUGINS="other"')
    assert error.value.__cause__ is not None


def test_a_dotted_attribute(namespace):
    host = load(("a", namespace("model:A", target="json:JSONEncoder.encode")))
    assert host.resolve("model", "A").__qualname__ == "JSONEncoder.encode"


def claim(name: str | None) -> object:
    return lambda hf_config, files: name and Claim(name=name, reason=f"{hf_config['x']} in {files[0]}")


@pytest.mark.parametrize("names, result", [([None], None), (["awq"], "awq"), ([None, "awq", "awq"], "awq")])
def test_claims_on_a_checkpoint(namespace, names, result):
    host = load(*((f"p{i}", namespace(nybble_detect_quant=claim(name))) for i, name in enumerate(names)))
    found = host.detect_quant({"x": 1}, ["a.safetensors"])
    assert (found and (found.name, found.reason)) == (result and (result, "1 in a.safetensors"))


@pytest.mark.parametrize("hook, said", [
    (claim("gptq"), ["do not agree", "'a' says awq (1 in f)", "'b' says gptq (1 in f)", "--quantization"]),
    (lambda: "gptq", ["plugin 'b' must return a Claim", "'gptq'"]),
    (boom, ["nybble_detect_quant of plugin 'b' failed", "RuntimeError: boom", 'NYBBLE_PLUGINS="a"']),
], ids=["another claim", "no claim at all", "raises"])
def test_claims_that_cannot_be_used(namespace, hook, said):
    host = load(("a", namespace(nybble_detect_quant=claim("awq"))),
                ("b", namespace(nybble_detect_quant=(lambda hf_config: boom()) if hook is boom else hook)))
    with pytest.raises(PluginError) as error:
        host.detect_quant({"x": 1}, ["f"])
    assert [s for s in said if s not in str(error.value)] == []


def change(**values: object) -> object:
    """A hook that asks for `values`, and tries to smuggle another change past the host."""
    def nybble_configure(config: dict) -> dict:
        config["seed"] = "smuggled"
        return values

    return nybble_configure


CONFIG = {"block_size": 16, "dtype": "auto", "seed": 0}


def test_settings_are_merged(namespace, caplog):
    host = load(("a", namespace(nybble_configure=change(block_size=32))),
                ("b", namespace(nybble_configure=change(block_size=32, dtype="float32"))),
                ("c", namespace(nybble_configure=lambda: None)))
    given = dict(CONFIG)
    assert host.configure(given) == {"block_size": 32, "dtype": "float32", "seed": 0} and given == CONFIG
    assert "plugin b sets dtype: 'auto' -> 'float32'" in caplog.text
    assert load().configure(given) == CONFIG


@pytest.mark.parametrize("hook, said", [
    (change(block_size=8), ["plugins 'a' and 'b' disagree on the setting 'block_size'", "32 and 8"]),
    (change(blocksize=8), ["'blocksize', which does not exist", "did you mean block_size?"]),
    (lambda: [8], ["plugin 'b' must return a dict"]),
    (lambda config: 1 / 0, ["nybble_configure of plugin 'b' failed", "ZeroDivisionError"]),
], ids=["two values", "unknown field", "a list", "raises"])
def test_settings_that_cannot_be_merged(namespace, hook, said):
    host = load(("a", namespace(nybble_configure=change(block_size=32))),
                ("b", namespace(nybble_configure=hook)))
    with pytest.raises(PluginError) as error:
        host.configure(dict(CONFIG))
    assert [s for s in said if s not in str(error.value)] == []


def test_observers(namespace, caplog):
    """Each sees each step; one that raises is dropped and costs the others nothing."""
    seen: list[tuple[str, int]] = []

    def fragile(stats: int) -> None:
        seen.append(("fragile", stats))
        if stats == 1:
            raise SystemExit("tired")

    plugins = (("a", namespace(nybble_step_done=fragile)),
               ("b", namespace(nybble_step_done=lambda stats: seen.append(("b", stats)))))
    assert load().step_done is None
    step_done = load(*plugins).step_done
    for step in range(3):
        step_done(step)
    assert seen == [("fragile", 0), ("b", 0), ("fragile", 1), ("b", 1), ("b", 2)]
    assert caplog.text.count("nybble_step_done of plugin a failed") == 1
    strict = load(*plugins, strict=True).step_done
    with pytest.raises(PluginError, match="SystemExit: tired"):
        strict(1)


def test_commands(namespace):
    plugin = namespace(nybble_cli=lambda commands: commands.add("dump", "write JSON", "json:dumps"))
    host = load(("a", plugin))
    assert [(c.name, c.help, c.plugin) for c in host.cli_commands() if c.plugin != "builtin"] == [
        ("dump", "write JSON", "a")]
    assert host.resolve("command", "dump").__module__ == "json"
    refused = load(("a", plugin), ("b", plugin)).plugins[2]
    assert refused.cause == "plugins 'a' and 'b' both provide command:dump"


def test_routes(namespace):
    app = SimpleNamespace(routes=[])
    app.add_route = lambda *route: app.routes.append(route)
    good = namespace(nybble_routes=lambda app: app.add_route("/x", print, ["GET"]))
    load(("a", good)).add_routes(app)
    assert app.routes == [("/x", print, ["GET"])]
    with pytest.raises(PluginError, match="nybble_routes of plugin 'b' failed"):
        load(("b", namespace(nybble_routes=lambda app: 1 / 0))).add_routes(app)


def test_drift(namespace):
    """Workers compare names, versions, contents and who won; an empty fingerprint was never taken."""
    a, b = ("a", namespace("proposer:awq")), ("b", namespace("proposer:awq", target="json:loads"))
    parent = load(a, b, prefer=["proposer:awq=b"])
    load(a, b, prefer=["proposer:awq=b"]).check(parent.fingerprint())
    load().check(())
    for worker, said in [
        (load(a, b, prefer=["proposer:awq=a"]), "parent: proposer:awq from b; only here: proposer:awq from a"),
        (load(a), "only in the parent: b unknown "),
        (load(a, b), "b failed here: plugins 'a' and 'b' both provide proposer:awq"),
        (load(a, ("b", namespace("proposer:awq")), prefer=["proposer:awq=b"]), "only here: b unknown "),
    ]:
        with pytest.raises(PluginError) as error:
            worker.check(parent.fingerprint())
        assert said in str(error.value)
