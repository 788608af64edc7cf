"""`nybble config show`, `nybble env` and `nybble completion`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shtab

from nybble.engine.args import setting_fields
from nybble.engine.cli import VERBS, env
from nybble.engine.cli.parser import SERVER_FIELDS

Run = Callable[..., tuple[int, str, str]]


def test_config_show_names_every_origin(
    nybble: Run, checkpoint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serve.yaml").write_text("max-num-seqs: 8\nport: 1\n")
    for name, setting in (("BLOCK_SIZE", "32"), ("HOST", "0.0.0.0"), ("API_KEY", "s3cret")):
        monkeypatch.setenv(f"NYBBLE_{name}", setting)
    argv = (
        "config",
        "show",
        folder := checkpoint(),
        "--config",
        str(tmp_path / "serve.yaml"),
        *("--device", "cpu", "--shutdown-timeout", "5", "--api-key", "s3cret"),
    )
    code, out, _ = nybble(*argv)
    assert "s3cret" not in out
    lines = {line.split()[0]: line.split(None, 2)[1:] for line in out.splitlines()}
    assert code == 0 and list(lines) == ["setting", *setting_fields(), *SERVER_FIELDS]
    for name, value, origin in [
        ("model", folder, "--model"),
        ("max_num_seqs", "8", "serve.yaml"),
        ("block_size", "32", "env NYBBLE_BLOCK_SIZE"),
        ("max_model_len", "2048", "checkpoint: config.json max_position_embeddings"),
        ("device", "cpu", "--device"),
        ("enable_prefix_caching", "true", "default"),
        ("port", "1", "serve.yaml"),
        ("host", "0.0.0.0", "env NYBBLE_HOST"),
        ("shutdown_timeout", "5.0", "--shutdown-timeout"),
        ("sse_keepalive", "0.0", "default"),
    ]:
        assert lines[name] == [value, origin]
    rows = json.loads(nybble(*argv, "--json")[1])
    assert {"name": "block_size", "value": 32, "origin": "env NYBBLE_BLOCK_SIZE"} in rows


def test_config_show_of_the_demo(nybble: Run) -> None:
    rows = {r["name"]: r for r in json.loads(nybble("config", "show", "--json")[1])}
    assert rows["model"]["origin"] == "embedded demo checkpoint"
    assert rows["served_model_name"]["value"] == "nybble-demo"


def test_env_hides_secrets_and_nothing_else(nybble: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "HUB_TOKEN", "MAX_NUM_BATCHED_TOKENS"):
        monkeypatch.setenv(f"NYBBLE_{name}", "s3cret")
    found = json.loads(nybble("env", "--json")[1])
    assert found["variables"]["NYBBLE_API_KEY"] == found["variables"]["NYBBLE_HUB_TOKEN"] == "(hidden)"
    assert found["variables"]["NYBBLE_MAX_NUM_BATCHED_TOKENS"] == "s3cret"
    assert found["packages"]["torch"][0].isdigit() and found["cpus"] >= 1
    text = nybble("env")[1]
    assert "NYBBLE_API_KEY" in text and f"  torch{'':19}{found['packages']['torch']}" in text


@pytest.mark.parametrize(
    ("answer", "gpus"),
    [
        (
            SimpleNamespace(stdout="0, NVIDIA H100, 80 GiB, 9.0, 580\n"),
            {"0": "NVIDIA H100, 80 GiB, 9.0, 580"},
        ),
        (subprocess.TimeoutExpired("nvidia-smi", 10), {"nvidia-smi": "failed: "}),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, answer: Any, gpus: dict[str, str]) -> None:
    def run(*args: Any, **options: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(env.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(env.subprocess, "run", run)
    found = env.describe()["gpus"]
    assert found.keys() == gpus.keys() and all(found[name].startswith(gpus[name]) for name in gpus)


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_completion_knows_the_commands_and_flags(nybble: Run, shell: str) -> None:
    code, out, _ = nybble("completion", shell)
    assert code == 0 and "generate" in out
    assert shell == "tcsh" or "max-model-len" in out


def test_bash_completes_values(nybble: Run, tmp_path: Path) -> None:
    lines = {
        "serve --dtype b": "bfloat16",
        "config ''": "show",
        "completion ''": " ".join(shtab.SUPPORTED_SHELLS),
        "bench s": "serve step startup",
        "plugins ''": "list show",
    }
    script = nybble("completion", "bash")[1]
    for line in lines:
        words = f"(nybble {line})"
        script += f'\nCOMP_WORDS={words}; COMP_CWORD={len(line.split())}; _shtab_nybble; echo "${{COMPREPLY[@]}}"'
    (tmp_path / "c.sh").write_text(script)
    done = subprocess.run(["bash", str(tmp_path / "c.sh")], capture_output=True, text=True)
    assert dict(zip(lines, done.stdout.splitlines(), strict=True)) == lines, done.stderr


def test_completed_words_are_those_that_exist() -> None:
    from nybble.bench.cli import BENCHMARKS

    assert VERBS["bench"].words == tuple(BENCHMARKS)
    assert VERBS["completion"].words == tuple(shtab.SUPPORTED_SHELLS)
