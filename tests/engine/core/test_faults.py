"""What goes wrong in a step ends the request it concerns; what ends the engine is told to everyone, soon."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import types

import msgspec
import psutil
import pytest
from safetensors.torch import load_file, save_file

from nybble import LLM, AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from nybble.engine import async_llm
from nybble.engine.core import proc
from nybble.engine.core.client import EngineProcessHandle
from nybble.engine.core.messages import Failed, FromCore
from nybble.engine.core.proc import EngineProcess
from nybble.engine.metrics import StepStats
from nybble.engine.request import EngineCoreOutput, RequestOutputKind
from nybble.plugins.errors import CheckpointError, EngineDeadError, RequestError

POISON = 299
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def args(model, **settings):
    return EngineArgs(model=str(model), dtype="float32", num_gpu_blocks_override=64, use_tqdm_on_load=False, **settings)


@pytest.fixture(scope="module")
def poisoned(llama, tmp_path_factory):
    """The tiny Llama, except that one token's embedding is NaN."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, folder / "model.safetensors")
    return folder


def test_nan_ends_one_request_and_its_blocks_harm_nobody(poisoned):
    llm = LLM.from_engine_args(args(poisoned, enable_prefix_caching=False))
    healthy = [[7, 8, 9, 10], [20] * 30]
    (a,), (b,) = ([o.outputs[0].token_ids] for o in llm.generate(healthy, GREEDY, use_tqdm=False))
    mixed = llm.generate([healthy[0], [7, POISON, 9], healthy[1]], GREEDY, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in mixed] == ["length", "error", "length"]
    assert [mixed[0].outputs[0].token_ids, mixed[2].outputs[0].token_ids] == [a, b]
    assert "NaN" in mixed[1].outputs[0].error and mixed[1].outputs[0].token_ids == []
    for _ in range(3):  # the blocks that held NaN are reused
        assert [o.outputs[0].token_ids for o in llm.generate(healthy, GREEDY, use_tqdm=False)] == [a, b]


def test_a_step_that_raises_is_fatal_and_says_so_twice(llama, monkeypatch):
    llm = LLM.from_engine_args(args(llama))

    def boom(plan):
        raise RuntimeError("device lost")

    monkeypatch.setattr(llm.llm_engine.client.core.executor, "execute_model", boom)
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate([[5]], GREEDY, use_tqdm=False)
    with pytest.raises(EngineDeadError, match="device lost"):
        llm.generate([[5]], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("engine_process", [False, True])
def test_what_loading_raises_arrives_as_itself(llama, tmp_path, engine_process):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        LLM.from_engine_args(args(tmp_path), engine_process=engine_process)


def test_an_unplanned_failure_crosses_as_a_dead_engine():
    error = Failed("ZeroDivisionError", "division by zero").as_error()
    assert isinstance(error, EngineDeadError) and "ZeroDivisionError: division by zero" in str(error)
    assert isinstance(Failed("SystemExit", "x").as_error(), EngineDeadError)


def test_the_socket_folder_is_private():
    handle = EngineProcessHandle()
    try:
        assert os.stat(handle.folder.name).st_mode & 0o777 == 0o700
    finally:
        handle.process.kill()
        handle.stop()


def test_a_killed_engine_process_fails_a_waiting_sync_caller(llama):
    llm = LLM.from_engine_args(args(llama), engine_process=True)
    process = llm.llm_engine.client.handle.process
    process.send_signal(signal.SIGSTOP)  # so that the request is surely in flight
    llm.llm_engine.add_request("a", [5, 6], GREEDY)
    process.kill()
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match="signal 9"):
        while True:
            llm.llm_engine.step()
    assert time.monotonic() - start < 2
    llm.shutdown()


def test_a_killed_engine_process_fails_every_stream(llama):
    async def main():
        engine = AsyncLLM.from_engine_args(args(llama))
        await engine.start()
        long = GREEDY.replace(max_tokens=200)

        async def consume(i):
            async for _ in engine.generate([5, 6, i], long, str(i)):
                pass

        streams = [asyncio.create_task(consume(i)) for i in range(4)]
        await asyncio.sleep(0.05)
        engine._handle.process.kill()
        start = time.monotonic()
        results = await asyncio.gather(*streams, return_exceptions=True)
        took = time.monotonic() - start
        dead = engine.errored
        with pytest.raises(EngineDeadError):
            await consume(9)
        await engine.shutdown()
        return results, took, dead

    results, took, dead = asyncio.run(main())
    assert all(isinstance(r, EngineDeadError) for r in results), results
    assert dead and took < 2


@pytest.mark.parametrize("when", ["before", "during"])
def test_generate_on_a_killed_engine_raises_and_does_not_hang(llama, when):
    llm = LLM.from_engine_args(args(llama), engine_process=True)
    process = llm.llm_engine.client.handle.process
    if when == "before":
        process.kill()
        process.wait()
    else:
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, process.kill).start()
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="signal 9"):
            llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    llm.shutdown()
    llm.shutdown()


def test_an_engine_that_never_starts_is_an_error(llama, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EngineDeadError, match="exit code 1"):
        LLM.from_engine_args(args(llama), engine_process=True)


def test_the_thread_that_made_an_engine_may_end(llama):
    made = []
    thread = threading.Thread(target=lambda: made.append(LLM.from_engine_args(args(llama), engine_process=True)))
    thread.start()
    thread.join()
    (llm,) = made
    (output,) = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 12
    llm.shutdown()


def test_a_long_temporary_path_is_no_obstacle(llama, tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    llm = LLM.from_engine_args(args(llama), engine_process=True)
    llm.shutdown()


def test_what_fails_after_loading_leaves_no_process(llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": -5}')
    before = psutil.Process().children()
    with pytest.raises(CheckpointError, match="generation_config"):
        LLM.from_engine_args(args(tmp_path), engine_process=True)
    assert psutil.Process().children() == before


@pytest.mark.parametrize("wrong", [dict(ignore_eos=1), dict(bad_words="foo"), dict(extra_args={"x": object()}),
                                   dict(skip_special_tokens="no")], ids=lambda wrong: next(iter(wrong)))
def test_a_badly_typed_request_is_refused_alone(llama, wrong):
    llm = LLM.from_engine_args(args(llama))
    with pytest.raises(RequestError):
        llm.generate([[5]], SamplingParams(**wrong), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_an_id_may_be_used_again_at_once(llama):
    """The core is ahead of an abort; what it still says of the old request must not reach the new one."""
    engine = LLMEngine.from_engine_args(args(llama), engine_process=True)
    long = GREEDY.replace(max_tokens=150, output_kind=RequestOutputKind.FINAL_ONLY)

    def finish():
        while engine.has_unfinished_requests():
            for output in engine.step():
                return output.outputs[0].token_ids

    engine.add_request("same", [5, 6, 7], long)
    expected = finish()
    for _ in range(15):
        engine.add_request("same", [9, 8], long.replace(output_kind=RequestOutputKind.DELTA))
        engine.step()
        engine.abort_request(["same"])
        engine.add_request("same", [5, 6, 7], long)
        assert finish() == expected
    assert engine.step() == []
    engine.shutdown()


def test_refusals_reach_their_owners_and_nobody_else(llama):
    engine = LLMEngine.from_engine_args(args(llama, max_queue=1, max_num_seqs=1))
    final = GREEDY.replace(output_kind=RequestOutputKind.FINAL_ONLY)
    for name in ("a", "1_x"):
        engine.add_request(name, [5, 6, 7], final)
        engine.step()
    for name in ("b", "c"):
        engine.add_request(name, [5, 6, 7], final)
    engine.add_request("x", [5, 6, 7], final.replace(n=3, temperature=1.0))
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step()}
    assert {name: o.finish_reason for name, o in done.items()} == {
        "a": "length", "1_x": "length", "b": "error", "c": "error", "x": "error"}
    assert all(done[name].error_code == "engine_overloaded" for name in "bcx")


def test_a_message_too_large_ends_one_request(llama, monkeypatch):
    """Whole-vocabulary logprobs of a long prompt do not fit a small message limit; the others go on."""
    core = EngineProcess.__new__(EngineProcess)
    sent, aborted = [], []
    core.encoder = msgspec.msgpack.Encoder()
    core.socket = types.SimpleNamespace(send=lambda data: sent.append(msgspec.msgpack.decode(data, type=FromCore)))
    core.core = types.SimpleNamespace(abort_requests=aborted.extend)
    monkeypatch.setattr(proc, "MAX_MESSAGE_BYTES", 1000)
    small, big = EngineCoreOutput(request_id="s", new_token_ids=[1]), EngineCoreOutput(
        request_id="b", new_token_ids=list(range(900)))
    core.send_outputs([small, big, small], StepStats())
    outputs = [output for message in sent for output in message.outputs]
    assert [o.finish_reason for o in outputs] == [None, "error", None] and aborted == ["b"]


def test_async_front_end_survives_its_users(llama, monkeypatch):
    async def main():
        engine = AsyncLLM.from_engine_args(args(llama))
        await engine.start()
        engine.add_stats_listener(lambda stats: 1 / 0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.reset_prefix_cache(), 0)
        output = [o async for o in engine.generate([5, 6], GREEDY, "a")][-1]
        assert len(output.outputs[0].token_ids) == 12 and engine.is_running

        monkeypatch.setattr(async_llm, "OFF_LOOP_CHARS", 10)
        stream = engine.generate("tokenized in a thread", GREEDY.replace(max_tokens=200), "t")
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await engine.abort("t")
        assert (await first).outputs[0].finish_reason == "abort"

        engine._handle.process.send_signal(signal.SIGSTOP)
        call = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0.05)
        engine._handle.process.kill()  # a stopped process dies of it, and never answers
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(call, 3)
        await engine.shutdown()

    asyncio.run(main())


def test_the_engine_process_dies_with_its_parent(llama):
    """The child's standard input closes when the parent is gone, whatever ended it."""
    llm = LLM.from_engine_args(args(llama), engine_process=True)
    process = llm.llm_engine.client.handle.process
    process.stdin.close()
    assert process.wait(timeout=5) == 1


def test_async_streams_abort_and_refuse(llama):
    async def main():
        engine = AsyncLLM.from_engine_args(args(llama, max_queue=1, max_num_seqs=1))
        await engine.start()
        expected = [o async for o in engine.generate([5, 6, 7], GREEDY, "whole")][-1].outputs[0].token_ids

        stream = engine.generate([5, 6, 7], GREEDY.replace(max_tokens=200), "cut")
        await anext(stream)
        with pytest.raises(RequestError, match="in use"):
            await anext(engine.generate([5], GREEDY, "cut"))
        await stream.aclose()
        assert engine.num_unfinished == 0

        last = None
        async for output in engine.generate([5, 6, 7], GREEDY.replace(max_tokens=200), "aborted"):
            last = output
            await engine.abort("aborted")
        assert last.finished and last.outputs[0].finish_reason == "abort"

        with pytest.raises(RequestError, match="vocabulary"):
            await anext(engine.generate([10**6], GREEDY, "wrong"))

        async def one(i):
            return [o async for o in engine.generate([5, 6, 7], GREEDY.replace(max_tokens=100), f"q{i}")]

        crowd = await asyncio.gather(*(one(i) for i in range(6)), return_exceptions=True)
        refused = [r for r in crowd if isinstance(r, RequestError)]
        assert refused and all(r.code == "engine_overloaded" for r in refused)
        again = [o async for o in engine.generate([5, 6, 7], GREEDY, "again")][-1]
        assert again.outputs[0].token_ids == expected
        assert await engine.reset_prefix_cache()
        stats = engine.latest_stats()
        assert stats.num_running == 0 and stats.kv_usage == 0
        await engine.shutdown()

    asyncio.run(main())


