"""The embedded model: made once, whatever races or forbids, and it says what it is."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from nybble import LLM, EngineArgs, SamplingParams
from nybble.engine import demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_made_once_small_and_the_same_each_time(cache, tmp_path):
    folder = demo.demo_checkpoint()
    assert folder.parent == cache and demo.demo_checkpoint() == folder
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4 << 20
    (tmp_path / "again").mkdir()
    demo.write_demo(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_two_processes_make_one(cache):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.map(_make, [str(cache)] * 6)
    assert len(set(folders)) == 1 and [p.name for p in cache.iterdir()] == [Path(folders[0]).name]


def _make(cache: str) -> str:
    import os

    os.environ["NYBBLE_CACHE_DIR"] = cache
    return str(demo.demo_checkpoint())


def test_a_read_only_cache_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert (demo.demo_checkpoint() / "config.json").is_file()


@pytest.mark.parametrize("name", demo.FILES)
def test_a_damaged_copy_is_replaced(cache, name):
    folder = demo.demo_checkpoint()
    (folder / name).unlink()
    assert demo.demo_checkpoint() == folder and (folder / name).is_file()
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_other_users_may_read_it(cache):
    assert demo.demo_checkpoint().stat().st_mode & 0o755 == 0o755


def test_other_models_pass_through():
    args = EngineArgs(model="somewhere")
    assert demo.resolve_demo(args) is args


def test_it_answers_and_is_marked(cache):
    llm = LLM(use_tqdm_on_load=False, num_gpu_blocks_override=50)
    config = llm.llm_engine.config.model
    assert config.is_demo and config.served_model_name == "nybble-demo"
    (output,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert len(output.outputs[0].text) == 20 and output.outputs[0].text.isprintable()
    llm.shutdown()


def test_transformers_reads_it_as_it_is(cache, transformers_greedy):
    folder = demo.demo_checkpoint()
    llm = LLM(str(folder), use_tqdm_on_load=False, num_gpu_blocks_override=50)
    prompt = llm.get_tokenizer().encode("The quick brown fox")
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    assert [output.outputs[0].token_ids] == transformers_greedy(folder, [prompt], 24)
    assert json.loads((folder / "config.json").read_text())["nybble_demo"] is True
    llm.shutdown()
