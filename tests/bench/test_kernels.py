"""`bench kernels`: every family on a CPU, what is wrong is not timed, and the page that it draws."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from nybble.bench import kernels as command
from nybble.bench.floors import Floors
from nybble.bench.measured import Collector, Measured
from nybble.bench.page import Axes, page
from nybble.bench.results import Metric, make_result, read_json, write_json
from nybble.csrc.fp8_gemm import CutlassFp8Kernel
from nybble.csrc.quantize import quantize
from nybble.csrc.tiles import TileKernel
from nybble.engine.attention.torch_paged import TorchPagedRun
from nybble.engine.cli import main
from nybble.moe.reference import ReferenceBackend

CPU = torch.device("cpu")
SLOW = Floors(bandwidth=1e9, operations={"float": 1e9, "fp8_e4m3": 2e9, "int8": 2e9})
SMALL = ["bench", "kernels", "--shapes", "small", "--device", "cpu", "--samples", "2", "--tokens", "1,5"]


@pytest.fixture(autouse=True)
def floors(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(command, "measure_floors", lambda device: SLOW)


def rows(found):
    return {name.rpartition("/")[0] for name in found.metrics if not name.endswith("/share")}


def test_every_family(tmp_path, capsys):
    out, html = tmp_path / "r.json", tmp_path / "page" / "k.html"
    assert main([*SMALL, "--family", "all", "--schemes", "w4,fp8-channel", "--output-json", str(out), "--html",
                 str(html)]) == 0
    found, content = read_json(out), json.loads(out.read_text())
    attention = {f"{case}/torch" for case in ("decode/4x40", "prompt/2x24", "mla-decode/4x40", "mla-prompt/2x24",
                                              "decode/4x40/fp8")}
    moe = {*(f"small/{form}/reference" for form in ("fp8", "int4", "bf16")), "small/bf16/torch-grouped"}
    linear = {"square/w4/cpu_int4", "square/w4/tiles", "square/fp8-channel/tiles", "square/w4/torch-plain"}
    assert attention | moe | linear <= rows(found)
    assert found.metrics["square/w4/tiles/5"].n == 2 and content["floors"]["bandwidth"] and not content["wrong"]
    assert content["absent"]["small/int4/cutlass"].startswith("multiplies FP8")
    assert {"small/int4/torch-grouped", "small/fp8/torch-grouped"} <= content["absent"].keys()
    assert "experts hit" in capsys.readouterr().out
    text = html.read_text()
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    assert text.count("<svg") >= 3 + 2 + 3 and "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert all(name in text for name in ("cpu_int4", "mla-prompt/2x24", "small/bf16", "Not run"))


@pytest.mark.parametrize(("family", "owner", "method", "what"), [
    ("linear", TileKernel, "__call__", "square/w4/tiles/1"),
    ("attention", TorchPagedRun, "run", "prompt/2x24/torch"),
    ("attention", TorchPagedRun, "run_latent", "mla-decode/4x40/torch"),
    ("moe", ReferenceBackend, "__call__", "small/int4/reference/5"),
], ids=["linear", "attention", "latent", "moe"])
def test_what_is_wrong_is_not_timed(family, owner, method, what, monkeypatch, tmp_path, capsys):
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *args: right(*args) * 1.05)
    out = tmp_path / "r.json"
    kernels = {"linear": "tiles", "attention": "torch", "moe": "reference"}[family]
    assert main([*SMALL, "--family", family, "--kernels", kernels, "--schemes", "w4", "--output-json", str(out)]) == 1
    assert re.search(rf"{what} +WRONG", capsys.readouterr().out)
    assert any(line.startswith(what) for line in json.loads(out.read_text())["wrong"])
    assert what.rpartition("/")[0] not in rows(read_json(out))


def test_an_error_in_one_backend_costs_no_other(monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(TorchPagedRun, "run_latent", fail)
    out = tmp_path / "r.json"
    assert main([*SMALL, "--family", "attention", "--output-json", str(out)]) == 0
    assert json.loads(out.read_text())["absent"]["mla-decode/4x40/torch"] == "RuntimeError: out of luck"
    assert "decode/4x40/fp8/torch" in rows(read_json(out))


def test_a_spent_budget_ends_the_run(tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main([*SMALL, "--family", "all", "--budget", "1e-6", "--output-json", str(out)]) == 0
    assert not read_json(out).metrics and capsys.readouterr().out.count("left out") == 3


@pytest.mark.parametrize("words", [["--family", "x"], ["--kernels", "x"], ["--schemes", "x"], ["--budget", "-1"]])
def test_refused(words):
    assert main([*SMALL, *words]) == 2


def test_a_slower_kernel_is_a_regression(tmp_path):
    def write(name: str, us: float):
        metrics = {"qkv/w4/ours/1": Metric.of([us, us], "us", better="lower"),
                   "qkv/w4/ours/1/share": Metric.of([10 / us], "of floor", better="higher")}
        result = make_result("kernels", [], model="m", toy_model=False, device="cpu", workload={}, metrics=metrics)
        write_json(tmp_path / name, msgspec.structs.replace(result, load_average=0.0))
        return str(tmp_path / name)

    before, same, slower = write("a", 20.0), write("b", 20.4), write("c", 25.0)
    assert main(["bench", "compare", before, same]) == 0 and main(["bench", "compare", before, slower]) == 1


def measured(**changes) -> Measured:
    return Measured(**{"family": "linear", "case": "a<b", "kernel": "k&k", "size": 1, "seconds": [2e-3, 4e-3, 1e-3],
                       "moved": 1e6, "operations": 3e6, "kind": "fp8_e4m3", "error": 0.5, **changes})


def test_row_by_hand():
    row = measured()
    metrics = row.metrics(SLOW)
    assert metrics["a<b/k&k/1"].median == 2000 and metrics["a<b/k&k/1/share"].median == 0.75  # 1.5 ms of 2
    assert "  2000.0    1500.0  75.0%" in row.line(SLOW) and row.line(SLOW).endswith("0.50")


def test_page_escapes_and_holds_every_point():
    collector = Collector(floors=SLOW, device=CPU, samples=1)
    collector.rows = [measured(size=size, seconds=[size * 1e-3]) for size in (1, 4, 64)]
    collector.wrong = ["<bad>"]
    text = page(make_result("kernels", [], model="m", toy_model=False, device="cpu", workload={},
                            metrics=collector.metrics()), collector)
    assert "<bad>" not in text and "&lt;bad&gt;" in text and "a&lt;b" in text and text.count("<circle") == 6
    axes = Axes([(1, 10), (1000, 1e-9)])
    for x, y in ((1, 10), (1000, 1e-9), (31, 1e-3)):
        across, down = axes.place(x, y)
        assert 52 <= across <= 408 and 24 <= down <= 264
    assert axes.place(1, 10)[0] < axes.place(1000, 10)[0] and axes.place(1, 10)[1] < axes.place(1, 1)[1]


@pytest.mark.gpu
def test_every_family_on_a_device(tmp_path):
    out = tmp_path / "r.json"
    words = [word if word != "cpu" else "cuda" for word in SMALL]
    assert main([*words, "--family", "all", "--output-json", str(out)]) == 0
    found = rows(read_json(out))
    assert {"square/w4/triton_w4a16", "square/fp8-channel/triton_w8a8", "small/int4/fused"} <= found
    assert {f"{case}/triton" for case in ("decode/4x40", "prompt/2x24", "mla-decode/4x40")} <= found


def test_fp8_products_beside_torchs(monkeypatch):
    """Of inputs that are rounded before: CUTLASS's tiles at any number of tokens, torch's where it can multiply."""
    asked = []
    monkeypatch.setattr("nybble.csrc.fp8_gemm.linear.load_op", lambda op: lambda *args: asked.append(args))
    monkeypatch.setattr("nybble.csrc.fp8_gemm.linear.optional_op", lambda op, device: None)
    monkeypatch.setattr(command, "triton_quantize", quantize)
    matrix = command.random_matrix(command.SCHEMES["fp8-channel"], 32, 64, CPU)
    x = torch.randn(600, 64).bfloat16()
    products = command.scaled_products([CutlassFp8Kernel(matrix, x.dtype)], x)
    assert set(products) == {"cutlass-scaled", "torch-scaled"}
    out, expected = products["torch-scaled"][0](), x.float() @ matrix.dequant(0, 32).T
    assert (out - expected).norm() < 0.05 * expected.norm()
    products["cutlass-scaled"][0]()
    assert asked[0][0].shape == (600, 32) and torch.equal(asked[0][1].float(), quantize(x, command.TOKEN)[0].float())
    assert not command.scaled_products([], x)
