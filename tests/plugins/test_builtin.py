"""Every part that nybble brings itself is where its table says."""

from __future__ import annotations

import pytest

from nybble.plugins.manager import PluginHost

HOST = PluginHost.load(allow="", strict=True)


@pytest.mark.parametrize("key", HOST.plugins[0].provides)
def test_it_is_there(key):
    kind, _, name = key.partition(":")
    part = HOST.resolve(kind, name)
    assert callable(part) and HOST.resolve(kind, name) is part and HOST.owner(kind, name) == "builtin"


def test_it_has_what_the_engine_asks_for_by_default():
    wanted = {"model": "LlamaForCausalLM", "executor": "uniproc", "loader": "safetensors",
              "attention_backend": "torch", "command": "bench"}
    assert {kind: name for kind, name in wanted.items() if name in HOST.names(kind)} == wanted
