"""Which kernel runs a layer: the user's pin, a plugin's offer, and an account of it that every door gives alike."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import torch

from nybble import LLM, SamplingParams, hookimpl
from nybble.csrc.tiles import TileKernel
from nybble.engine.args import EngineArgs
from nybble.engine.cli import main
from nybble.engine.loader import get_model
from nybble.plugins.builtin import nybble_kernels
from nybble.plugins.errors import PluginError, UsageError
from nybble.plugins.manager import PluginHost

KERNELS = set(nybble_kernels())
ENGINE = dict(device="cpu", dtype="float32", num_gpu_blocks_override=64, use_tqdm_on_load=False)
FLAGS = ("--device", "cpu", "--dtype", "float32", "--num-gpu-blocks-override", "64", "--no-use-tqdm-on-load")
QKV, DOWN = "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    """A 4-bit GPTQ checkpoint with a plain head."""
    return quantized("gptq").write(tmp_path_factory.mktemp("gptq"))


@pytest.fixture
def loaded(folder, monkeypatch):
    """loaded(**kernels, pin=None) -> layers by name, a plugin offering `kernels`: classes, or names of modules."""
    def load(pin=None, **kernels):
        module = ModuleType("plug_kernels")
        table = {name: found if isinstance(found, str) else f"plug_kernels:{name}" for name, found in kernels.items()}
        vars(module).update(kernels)
        monkeypatch.setitem(sys.modules, "plug_kernels", module)
        plugin = SimpleNamespace(NYBBLE_API=(1, 0), nybble_kernels=hookimpl(lambda: table))
        host = PluginHost.load(allow="fast" if kernels else "", extra=[("fast", plugin)] if kernels else [])
        args = EngineArgs(model=str(folder), linear_backend=pin, **ENGINE)
        found = get_model(args.create_engine_config(host), host, torch.device("cpu"))
        return {layer.layer: layer for layer in found.layers}

    return load


class Eager(TileKernel):
    """Goes before all others."""

    name, priority = "eager", 100


class Fragile(Eager):
    """Promises what it cannot do."""

    name = "fragile"

    def __init__(self, matrix, dtype):
        raise MemoryError("no room for a workspace")


def quantized_layers(layers):
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def test_every_layer_says_who_runs_it_and_why_no_other(loaded):
    layers = loaded()
    assert len(layers) == 9 and layers["lm_head"].refusals == {}
    for layer in quantized_layers(layers).values():
        assert (layer.kernel, layer.scheme) == ("tiles", "int4 g32")
        assert layer.refusals.keys() == KERNELS - {"tiles"} and all(layer.refusals.values())
    assert "float32 path is scalar code" in layers[QKV].refusals["cpu_int4"]
    assert layers[QKV].shape == (128, 64) and layers[QKV].bytes == 128 * 32 + 128 * 2 * 2


@pytest.mark.parametrize("pin", ["tiles", "reference"])
def test_a_pin_is_taken(loaded, pin):
    for layer in quantized_layers(loaded(pin=pin)).values():
        assert layer.kernel == pin
        assert layer.refusals.keys() == KERNELS - {pin}
        assert pin == "tiles" or layer.refusals["tiles"] == "reference is pinned"


def test_a_pin_that_cannot_run_a_layer(folder, capsys):
    assert main(["generate", str(folder), "-p", "Hi", "--linear-backend", "cpu_int8", *FLAGS]) == 2
    error = capsys.readouterr().err
    for words in (f"{QKV}: the pinned kernel cpu_int8 cannot run this layer", "leave --linear-backend out",
                  "int4 g32: multiplies 8-bit integer weights by inputs that are not quantized"):
        assert error.count(words) == 1, error


def test_a_pin_that_nobody_offers(loaded):
    with pytest.raises(UsageError, match="no kernel is named 'tilse'") as error:
        loaded(pin="tilse")
    assert error.value.fix == "did you mean tiles?" and set(error.value.known) == KERNELS | {"reference"}


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8", "ct"])
def test_greedy_ids_are_those_of_the_reference(quantized, form, tmp_path):
    folder, params = quantized(form).write(tmp_path), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    texts = []
    for pin in (None, "reference"):
        llm = LLM(model=str(folder), linear_backend=pin, **ENGINE)
        kernels = {layer.kernel for layer in llm.llm_engine.layers if layer.layer != "lm_head"}
        assert ("reference" in kernels) == (pin is not None) and len(kernels) == 1
        outputs = llm.generate([[5, 6, 7], [40, 41]], params, use_tqdm=False)
        texts.append([output.outputs[0].token_ids for output in outputs])
        llm.shutdown()
    assert texts[0] == texts[1]


def test_a_plugin_of_higher_priority_is_chosen(loaded):
    for layer in quantized_layers(loaded(eager=Eager)).values():
        assert layer.kernel == "eager" and layer.refusals.keys() == KERNELS
        assert layer.refusals["tiles"] == "eager goes first (priority 100 over -10)"


@pytest.mark.parametrize("pin", [None, "fragile"])
def test_a_kernel_that_fails_in_its_constructor(loaded, pin):
    with pytest.raises(PluginError) as error:
        loaded(fragile=Fragile, pin=pin)
    assert error.value.asked == f"{QKV}: kernel fragile said it could run this layer, then failed"
    assert error.value.found == "MemoryError: no room for a workspace" and "--linear-backend" in error.value.fix


@pytest.mark.parametrize("target, cause", [("no_such_module:Kernel", "No module named 'no_such_module'"),
                                           ("json:Kernel", "module 'json' has no attribute 'Kernel'")])
def test_a_kernel_that_cannot_be_imported(loaded, target, cause):
    for layer in quantized_layers(loaded(lost=target)).values():
        assert layer.kernel == "tiles" and cause in layer.refusals["lost"]
        assert "plugin 'fast'" in layer.refusals["lost"]
    with pytest.raises(PluginError, match="kernel:lost of plugin 'fast' cannot be imported") as error:
        loaded(lost=target, pin="lost")
    assert cause in error.value.found


@pytest.mark.parametrize("wrong, words", [(dict, "is not a LinearKernel"), (7, "is not a LinearKernel"),
                                          (Eager, "calls itself by another name: 'eager'")],
                         ids=["another class", "no class", "another name"])
def test_what_is_no_kernel_of_its_name(loaded, wrong, words):
    layer = loaded(wrong=wrong)[QKV]
    assert layer.kernel == "tiles" and words in layer.refusals["wrong"]
    with pytest.raises(PluginError, match=f"kernel 'wrong' {words.partition(':')[0]}"):
        loaded(wrong=wrong, pin="wrong")


def test_a_kernel_that_cannot_say_whether_it_can(loaded):
    class Unsure(Eager):
        name = "unsure"

        @classmethod
        def supports(cls, problem):
            raise KeyError(problem.scheme.bits)

    with pytest.raises(PluginError, match=r"unsure failed when asked whether it can run .*rows=128") as error:
        loaded(unsure=Unsure)
    assert error.value.found == "KeyError: 4"


def test_parts_stored_in_different_ways_are_listed_each(quantized, tmp_path, load):
    checkpoint, name = quantized("gptq"), "model.layers.0.self_attn.v_proj"
    for tensor in [key for key in checkpoint.tensors if key.startswith(name)]:
        del checkpoint.tensors[tensor]
    checkpoint.tensors[f"{name}.weight"] = checkpoint.dense[f"{name}.weight"]
    layers = {layer.layer: layer for layer in load(checkpoint.write(tmp_path)).layers}
    parts = [layers[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv"]
    assert [part.scheme for part in parts] == ["int4 g32", "int4 g32", "float32"]
    assert [part.shape for part in parts] == [(64, 64), (32, 64), (32, 64)]
    assert QKV not in layers and QKV.replace("0", "1") in layers


def serve(folder, port):
    command = [sys.executable, "-m", "nybble", "serve", str(folder), "--port", str(port), *FLAGS]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_generate_and_a_server_give_the_same_account(folder, loaded, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = serve(folder, port)
    try:
        words = ["-p", "Hi", "--max-tokens", "2", "--temperature", "0", "--load-report", "json", *FLAGS]
        assert main(["generate", str(folder), *words]) == 0
        printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
        layers = loaded()
        assert [layer["layer"] for layer in printed["layers"]] == list(layers)
        for layer in printed["layers"]:
            known = layers[layer["layer"]]
            assert layer == {"layer": known.layer, "scheme": known.scheme, "kernel": known.kernel,
                             "shape": list(known.shape), "bytes": known.bytes, "refusals": known.refusals}
        attention = printed["attention"]
        assert attention["backend"] in ("cpu", "torch") and attention["layers"] > 0
        assert attention["refusals"]["triton"] == "runs on CUDA, not on cpu"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                assert server.poll() is None, server.communicate()[1]
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.02)
            assert http.get("/nybble/layers").json() == printed
    finally:
        server.kill()
        server.communicate()
