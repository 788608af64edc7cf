"""Logging is set up by entry points alone, and the three debugging variables do what they say."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.plugins import log
from nybble.plugins.errors import UsageError


@pytest.fixture
def untouched():
    logger = logging.getLogger("nybble")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_importing_leaves_logging_alone(untouched):
    code = "import logging, nybble, nybble.plugins.log; print(logging.getLogger('nybble').handlers)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_level_and_prefix(untouched, monkeypatch, capsys):
    monkeypatch.setenv("NYBBLE_LOGGING_LEVEL", "warning")
    log.configure(prefix="[engine] ")
    log.get_logger("nybble.x").info("quiet")
    log.get_logger("nybble.x").warning("loud")
    assert re.fullmatch(r"WARNING \d\d:\d\d:\d\d \[engine\] loud\n", capsys.readouterr().err)


def test_an_unknown_level_is_an_error(untouched, monkeypatch):
    monkeypatch.setenv("NYBBLE_LOGGING_LEVEL", "LOUD")
    with pytest.raises(UsageError, match=r"LOUD(.|\n)*DEBUG, INFO, WARNING, ERROR"):
        log.configure()


def test_trace_function_writes_every_call():
    code = ("import threading; from nybble.plugins import log, env; log.configure()\n"
            "t = threading.Thread(target=env.read_flag, args=('NYBBLE_STRICT_KV',)); t.start(); t.join()")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={"NYBBLE_TRACE_FUNCTION": "1", "PATH": "/usr/bin:/bin"})
    path = Path(re.search(r"tracing every nybble call to (\S+);", run.stderr)[1])
    assert re.search(r"^\d+\.\d+ \d+ nybble\.plugins\.env\.read_flag$", path.read_text(), re.M)


def test_log_scheduler_prints_one_line_a_step(llama, monkeypatch, caplog):
    from nybble import LLM, SamplingParams

    monkeypatch.setenv("NYBBLE_LOG_SCHEDULER", "1")
    llm = LLM(str(llama), use_tqdm_on_load=False, num_gpu_blocks_override=50)
    with caplog.at_level(logging.INFO, logger="nybble.engine.sched"):
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    llm.shutdown()
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("nybble.engine.sched")]
    assert len(lines) == 4 and all(re.match(r"step \d+: \d+ running, \d+ waiting, ", line) for line in lines)
    assert "3 new" in lines[0] and "1 new" in lines[1]
