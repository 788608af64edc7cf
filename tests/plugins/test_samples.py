"""The plugins of docs/plugins.md, installed by pip and used: what the page shows is what runs here."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

import pytest

from nybble.plugins.errors import RequestError
from nybble.plugins.manager import PluginHost

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "plugins.md"
SAMPLES = ("sample_model", "sample_processor")
LANGUAGES = {".py": "python", ".toml": "toml"}
FILES = [path for sample in SAMPLES for path in (HERE / sample).rglob("*") if path.suffix in LANGUAGES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_the_page_shows_the_code(path):
    assert f"```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n" in PAGE.read_text()


def test_the_notebook_of_the_page_runs(site):
    (site.path / "my_module.py").write_text("class MyConfig: ...\n")
    code = PAGE.read_text().partition("## In tests and notebooks")[2].split("```")[1].removeprefix("python\n")
    (site.path / "notebook.py").write_text(code)
    names = runpy.run_path(str(site.path / "notebook.py"))
    assert names["part"].__name__ == "MyConfig" and names["host"].names("proposer") == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Both samples, really installed, and a host that found them."""
    for tool in ("pip", "setuptools"):
        if find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for sample in SAMPLES:  # a build writes beside what it builds
        shutil.copytree(HERE / sample, sources / sample)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                    "--no-build-isolation", "--disable-pip-version-check", "--target", target,
                    *(sources / sample for sample in SAMPLES)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NYBBLE_PLUGINS", raising=False)
        patch.syspath_prepend(str(target))
        invalidate_caches()
        yield PluginHost.load(allow="granite,no_repeat", strict=True)


def test_they_load(installed):
    loaded = [p for p in installed.plugins if p.status == "loaded" and p.name != "builtin"]
    assert [(p.name, p.distribution, p.version, p.provides) for p in loaded] == [
        ("granite", "nybble-granite", "1.0", ("model:GraniteForCausalLM",)),
        ("no_repeat", "nybble-no-repeat", "1.0", ("logits_processor:no_repeat",)),
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_granite(installed, make_checkpoint, tied):
    """Logits of a random checkpoint against transformers; plain causal attention stands in for a backend."""
    import torch
    import transformers

    from nybble.models import Batch, Fields, Make

    class Causal:
        def run(self, layer, q, k, v):
            k, v = (x.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1) for x in (k, v))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=layer.scale).transpose(0, 1)

    folder = make_checkpoint("Granite", embedding_multiplier=3.0, attention_multiplier=0.1,
                             residual_multiplier=0.5, logits_scaling=2.0, tie_word_embeddings=tied)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    make = Make(dtype=torch.float32, device=torch.device("cpu"), max_len=64)
    fields = Fields(transformers.AutoConfig.from_pretrained(folder).to_dict(), "GraniteForCausalLM")
    model = installed.resolve("model", "GraniteForCausalLM")(fields, make)
    stored = dict(reference.named_parameters())
    ids = torch.arange(3, 40)
    with torch.inference_mode():
        for slot in model.slots():
            if not (slot.alias or slot.optional):
                slot.target.copy_(stored.pop(slot.name))
        assert not stored
        hidden = model(Batch(ids=ids, positions=torch.arange(len(ids)), attn=Causal()))
        found, expected = model.compute_logits(hidden), reference(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_processor_bans_what_would_repeat(installed):
    import numpy as np
    import torch

    from nybble import SamplingParams
    from nybble.engine.sample import LogitsProcessor, RowView

    processor = installed.resolve("logits_processor", "no_repeat")(8, torch.device("cpu"))
    assert isinstance(processor, LogitsProcessor)

    def row(size: int, prompt: list[int], output: list[int]) -> RowView:
        return RowView(params=SamplingParams(extra_args={"no_repeat_ngram": size}), stop_token_ids=(),
                       prompt_ids=np.array(prompt, dtype=np.int32), bad_words_token_ids=(), memo={},
                       output_ids=np.array(output, dtype=np.int32))

    rows = [row(2, [1, 2, 3, 2], [5, 2]), row(3, [1, 2, 4], [1, 2]), row(1, [6], []), row(3, [1], [])]
    logits = processor.apply(torch.zeros(4, 8), rows)
    assert [line.isinf().nonzero().flatten().tolist() for line in logits] == [[3, 5], [4], [6], []]
    for args, needed in ((None, False), ({}, False), ({"no_repeat_ngram": 2}, True)):
        assert processor.needs(SamplingParams(extra_args=args)) is needed
    with pytest.raises(RequestError, match="no_repeat_ngram must be a whole number"):
        processor.needs(SamplingParams(extra_args={"no_repeat_ngram": "2"}))
