"""Two plugins, one name: who wins, who is refused, and that the order of installation decides nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.plugins.errors import PluginError
from nybble.plugins.manager import PluginHost

A = "proposer:awq"
DUMMY = "loader:dummy"  # a built-in


def outcome(host: PluginHost) -> tuple[dict[str, str], dict[str, str]]:
    """Status of each plugin that is not built in, and the owner of every quant method."""
    return ({p.name: p.status for p in host.plugins if p.name != "builtin"},
            {name: host.owner("proposer", name) for name in host.names("proposer")})


# plugins as name -> (what they provide, what they override); --prefer; who fails; who owns the first key
CASES = {
    "alone": ({"a": ([A], [])}, [], [], "a"),
    "the later is refused": ({"a": ([A], []), "b": ([A], [])}, [], ["b"], "a"),
    "the later overrides": ({"a": ([A], []), "b": ([A], [A])}, [], [], "b"),
    "the earlier overrides": ({"a": ([A], [A]), "b": ([A], [])}, [], [], "a"),
    "both override": ({"a": ([A], [A]), "b": ([A], [A])}, [], ["b"], "a"),
    "one override is room for one": ({"a": ([A], []), "b": ([A], [A]), "c": ([A], [])}, [], ["c"], "b"),
    "an override of nothing": ({"a": ([A], [A])}, [], [], "a"),
    "a built-in is first": ({"a": ([DUMMY], [])}, [], ["a"], "builtin"),
    "a built-in overridden": ({"a": ([DUMMY], [DUMMY])}, [], [], "a"),
    "the user's choice": ({"a": ([A], []), "b": ([A], [])}, [f"{A}=b"], [], "b"),
    "the user's choice of the first": ({"a": ([A], []), "b": ([A], [])}, [f"{A}=a"], [], "a"),
    "the user's choice against an override": ({"a": ([A], []), "b": ([A], [A])}, [f"{A}=a"], [], "a"),
    "the user's choice of a built-in": ({"a": ([DUMMY], [DUMMY])}, [f"{DUMMY}=builtin"], [], "builtin"),
    "the user's choice among three": ({n: ([A], []) for n in "abc"}, [f"{A}=b"], [], "b"),
}


@pytest.mark.parametrize("plugins, prefer, failed, owner", CASES.values(), ids=CASES)
def test_who_wins(namespace, caplog, plugins, prefer, failed, owner):
    extra = [(n, namespace(*keys, overrides=tuple(over))) for n, (keys, over) in plugins.items()]
    host = PluginHost.load(extra=extra, prefer=prefer)
    key = next(iter(plugins.values()))[0][0]
    assert host.owner(*key.split(":")) == owner
    assert [p.name for p in host.plugins if p.status == "failed"] == failed
    for info in (p for p in host.plugins if p.status == "failed"):
        assert f"and {info.name!r} both" in info.reason and f"--prefer {key}=" in info.reason
    losers = [n for n in plugins if n not in (owner, *failed)]
    losers += ["builtin"] if key == DUMMY and owner != "builtin" else []
    said = f"{key} comes from plugin {owner} instead of" in caplog.text
    assert said == bool(losers) and all(name in caplog.text for name in losers)


def test_a_refused_plugin_frees_its_other_names(namespace):
    extra = [("a", namespace(A)), ("b", namespace(A, "proposer:x")), ("c", namespace("proposer:x"))]
    assert outcome(PluginHost.load(extra=extra)) == ({"a": "loaded", "b": "failed", "c": "loaded"},
                                                     {"awq": "a", "x": "c"})


@pytest.mark.parametrize("prefer, said", [
    (["awq=a"], "not of the form kind:name=plugin"),
    (["proposer:awq"], "not of the form kind:name=plugin"),
    (["propsoer:awq=a"], "did you mean proposer?"),
    (["proposer:awq=a", "proposer:awq=b"], "chooses two plugins"),
    (["proposer:awq=aa"], "there is no plugin 'aa'"),
    (["proposer:agw=a"], "did you mean proposer:awq?"),
    (["proposer:other=a"], "plugin 'a' does not provide proposer:other"),
    (["proposer:bad=bad"], "plugin 'bad' is failed"),
])
def test_a_wrong_choice_is_an_error(namespace, prefer, said):
    extra = [("a", namespace(A)), ("b", namespace("proposer:other")),
             ("bad", namespace("proposer:bad", target="?"))]
    with pytest.raises(PluginError) as error:
        PluginHost.load(extra=extra, prefer=prefer)
    assert said in str(error.value)


KEYS = [f"proposer:{name}" for name in "uvw"]
PLUGIN = st.tuples(st.sets(st.sampled_from(KEYS), min_size=1), st.sets(st.sampled_from(KEYS)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plugins=st.dictionaries(st.sampled_from("abcd"), PLUGIN, min_size=1), data=st.data())
def test_order_decides_nothing(namespace, plugins, data):
    """Any order of installation gives one host, in which each name has one owner and nothing is left over."""
    extra = [(n, namespace(*keys, overrides=tuple(over & keys))) for n, (keys, over) in plugins.items()]
    first = PluginHost.load(extra=extra)
    second = PluginHost.load(extra=data.draw(st.permutations(extra)))
    assert outcome(first) == outcome(second) and first.fingerprint() == second.fingerprint()
    status, owners = outcome(first)
    loaded = {n: plugins[n] for n in status if status[n] == "loaded"}
    assert min(plugins) in loaded, "the first has nobody to be in conflict with"
    assert set(owners) == {key.partition(":")[2] for keys, _ in loaded.values() for key in keys}
    for name, owner in owners.items():
        rivals = [n for n, (keys, over) in loaded.items() if f"proposer:{name}" in over & keys]
        assert rivals in ([owner], []) and owner in loaded
    # taking plugins out one by one never breaks what is left
    for name in data.draw(st.permutations(sorted(loaded))):
        first.unregister(name)
        assert name not in {first.owner("proposer", key) for key in first.names("proposer")}
    assert first.names("proposer") == []


def test_unregister_gives_back_what_was_overridden(namespace):
    host = PluginHost.load(extra=[("a", namespace(DUMMY, overrides=(DUMMY,), target="json:loads"))])
    assert host.resolve("loader", "dummy").__name__ == "loads"
    host.unregister("a")
    assert host.owner("loader", "dummy") == "builtin" and [p.name for p in host.plugins] == ["builtin"]
    with pytest.raises(PluginError, match="no plugin 'a' is loaded"):
        host.unregister("a")
