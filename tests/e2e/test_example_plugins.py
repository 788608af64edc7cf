"""The proof of the door: examples/plugins, installed by pip beside nybble, quantize, load and serve a Llama.

Each package gets a virtual environment of its own, which sees this one's packages; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import socket
import subprocess
import sysconfig
import time
import venv
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"
PROMPTS = ("The quick brown fox", "12+34=", "é中")
TOKENS = 24
CAUSE = "ImportError: libnf4.so.1: cannot open shared object file"
ENGINE = ("--dtype", "float32", "--device", "cpu", "--num-gpu-blocks-override", "64")
PROGRAM = """
import json, sys
from nybble import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", device="cpu", num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
    outputs = llm.generate(sys.argv[3:], params, use_tqdm=False)
    print(json.dumps([[o.prompt_token_ids, o.outputs[0].token_ids, o.outputs[0].text] for o in outputs]))
"""


class Environment:
    """A new virtual environment with one example installed."""

    def __init__(self, folder: Path, example: str) -> None:
        for tool in ("pip", "setuptools"):
            if find_spec(tool) is None:
                pytest.skip(f"{tool} is not installed")
        home = folder / "venv"
        venv.create(home, symlinks=True)
        self.python, self.variables = home / "bin" / "python", {**os.environ, "OMP_NUM_THREADS": "1"}
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (packages / "outer.pth").write_text("".join(lines))
        shutil.copytree(EXAMPLES / example, folder / example)  # a build writes beside what it builds
        self.run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
                 "--disable-pip-version-check", folder / example)

    def run(self, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """`python *words`, which must end with `code`."""
        done = subprocess.run([self.python, *words], env=self.variables, text=True, capture_output=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def nybble(self, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "nybble", *words, code=code)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("good"), "nybble-nf4")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("broken"), "nybble-nf4-broken")


@pytest.fixture(scope="module")
def source(make_checkpoint, tmp_path_factory) -> Path:
    """A bfloat16 Llama in shards; the 160 inputs of its down_proj are no whole blocks."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    shutil.copytree(make_checkpoint("Llama", shard="200KB", hidden_size=128, intermediate_size=160), folder)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        save_file({name: tensor.bfloat16() for name, tensor in load_file(shard).items()}, shard)
    return folder


@pytest.fixture(scope="module")
def quantized(good, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "llama-nf4"
    done = good.nybble("quantize-nf4", source, folder)
    assert "12 matrices in NF4, 2 left as they were" in done.stdout
    return folder


@pytest.fixture(scope="module")
def generated(good, quantized) -> list[list]:
    """Prompt ids, new ids and text of every prompt, from the installed plugin in a process of its own."""
    return json.loads(good.run("-c", PROGRAM, quantized, str(TOKENS), *PROMPTS).stdout)


def paper_levels() -> torch.Tensor:
    """The 16 quantiles of arXiv:2305.14314 as it defines them: 8 above 0, 7 below it, scaled to [-1, 1]."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    up, down = ([NormalDist().inv_cdf(0.5 + (last - 0.5) * i / n) for i in range(1, n + 1)] for n in (8, 7))
    return torch.tensor(sorted([*(-x for x in down), 0, *up])) / up[-1]


def dequantize(folder: Path, target: Path) -> Path:
    """Write an NF4 folder as plain float32, going by its README alone."""
    shutil.copytree(folder, target)
    levels = paper_levels()
    for shard in target.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith(".absmax")]:
            weight, absmax = name.replace(".absmax", ".weight"), tensors.pop(name)
            codes = torch.stack([tensors[weight] // 16, tensors[weight] % 16], dim=2).flatten(1)
            tensors[weight] = levels[codes.long()] * absmax.repeat_interleave(64, dim=1)
        save_file({name: tensor.float() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "nf4", "block_size": 64}
    (target / "config.json").write_text(json.dumps(config))
    places = json.loads(index.read_text())["weight_map"]
    places = {name: file for name, file in places.items() if not name.endswith(".absmax")}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def test_it_is_found(good):
    (plugin,) = [p for p in json.loads(good.nybble("plugins", "list", "--json").stdout) if p["name"] == "nf4"]
    assert (plugin["distribution"], plugin["version"], plugin["status"], plugin["provides"]) == (
        "nybble-nf4", "1.0", "loaded", ["command:quantize-nf4", "quant:nf4"])


def test_it_generates_what_transformers_does_with_the_same_values(
    generated, quantized, source, transformers_greedy, tmp_path
):
    prompts = [prompt for prompt, _, _ in generated]
    plain = dequantize(quantized, tmp_path / "plain")
    expected = transformers_greedy(plain, prompts, TOKENS)
    assert [ids for _, ids, _ in generated] == expected
    assert transformers_greedy(source, prompts, TOKENS) != expected  # four bits show: it is these values that count


def test_it_serves(good, quantized, generated, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        server = subprocess.Popen([good.python, "-m", "nybble", "serve", quantized, "--port", str(port), *ENGINE],
                                  env=good.variables, stderr=stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_for(http, server, log)
            answer = http.post("/v1/completions", json={"model": "llama-nf4", "prompt": PROMPTS[0], "temperature": 0,
                                                        "max_tokens": TOKENS, "ignore_eos": True}).json()
        assert answer["choices"][0]["text"] == generated[0][2]
    finally:
        server.kill()
        server.wait()


def wait_for(http: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"the server did not get there:\n{log.read_text()}")


def test_a_broken_twin_is_named_with_its_cause(broken):
    listed = broken.nybble("plugins", "list").stdout
    assert f"nf4_broken 1.0 failed: {CAUSE}" in listed
    (plugin,) = [p for p in json.loads(broken.nybble("plugins", "list", "--json").stdout) if p["status"] == "failed"]
    assert plugin["name"] == "nf4_broken" and "nybble_nf4_broken/__init__.py" in plugin["traceback"]
    broken.nybble("plugins", "list", "--strict-plugins", code=6)
    assert CAUSE in broken.nybble("generate", "-p", "Hello", "--strict-plugins", code=6).stderr


def test_a_broken_twin_takes_nothing_with_it(broken, source):
    done = broken.nybble("generate", source, "-p", PROMPTS[0], "--max-tokens", "4", "--temperature", "0", *ENGINE)
    assert done.stdout.strip() and done.stderr.count(f"plugin nf4_broken 1.0 is left out: {CAUSE}") == 1


@pytest.mark.parametrize("asked, model, code", [((), "quantized", 3), (("--quantization", "nf4"), "source", 6)],
                         ids=["by-checkpoint", "by-user"])
def test_who_asks_for_what_the_twin_would_bring_is_told(broken, request, asked, model, code):
    folder = request.getfixturevalue(model)
    error = broken.nybble("generate", folder, "-p", PROMPTS[0], *asked, *ENGINE, code=code).stderr
    told = error[error.index("error: "):]
    for part in ("'nf4'", f"plugin 'nf4_broken' is failed: {CAUSE}", "awq, compressed-tensors, fp8, gptq",
                 "mend plugin 'nf4_broken'; `nybble plugins show nf4_broken` says more"):
        assert part in told
