"""Dispatch, exit codes, and what is not imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import nybble as package
from nybble import hookimpl
from nybble.engine import cli
from nybble.plugins.errors import CheckpointError, NybbleError, OutOfMemoryError, PortInUseError
from nybble.plugins.manager import PluginHost

Run = Callable[..., tuple[int, str, str]]

WITHOUT_HEAVY_IMPORTS = """
import sys
from nybble.engine.cli import main
for argv in (["--help"], ["--version"], ["serve", "--help"], ["serve", "--help=all"], ["chat", "--help"],
             ["env"], ["completion", "bash"]):
    assert main(argv) == 0, argv
    heavy = {"torch", "transformers", "starlette", "uvicorn", "numpy"}
    if argv[0] != "completion":  # it imports every command to list its flags
        heavy |= {"pluggy", "nybble.plugins.manager"}
    assert not heavy & set(sys.modules), (argv, heavy & set(sys.modules))
assert not [name for name in sys.modules if name.startswith("nybble.models")]
"""


def run_python(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A new interpreter that finds this nybble; `encoding` is of its streams."""
    source = os.path.dirname(os.path.dirname(package.__file__))
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": source}
    if encoding := options.pop("encoding", None):
        environ["PYTHONIOENCODING"] = encoding
    return subprocess.run([sys.executable, *argv], stderr=subprocess.PIPE, text=True, env=environ, **options)


def test_help_version_env_and_completion_import_nothing_heavy() -> None:
    done = run_python("-c", WITHOUT_HEAVY_IMPORTS, stdout=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", [("--help",), ("serve", "--help"), ("env",)])
def test_a_stdout_that_fails(argv: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_python("-m", "nybble", *argv, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")  # who left wants no message
    with open("/dev/full", "w") as full:
        done = run_python("-m", "nybble", *argv, stdout=full)
    assert done.returncode == 70
    assert done.stderr == "error: cannot write to stdout\n  found: [Errno 28] No space left on device\n"


def test_streams_may_be_closed_or_of_another_encoding() -> None:
    done = run_python("-m", "nybble", "serve", "/no/such/\u00e9\udcff", stdout=subprocess.PIPE, encoding="ascii")
    assert done.returncode == 3 and "/no/such/??" in done.stderr
    closed = "import os, sys; os.closerange(0, 3); os.execl(sys.executable, sys.executable, '-m', 'nybble', 'env')"
    assert run_python("-c", closed).returncode == 0


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        ((), 0, "commands (nybble COMMAND --help says more)", ""),
        (("--help",), 0, "serve a model over the OpenAI API", ""),
        (("--version",), 0, "nybble ", ""),
        (("serve", "-h"), 0, "--shutdown-timeout", ""),
        (("plugins", "--help"), 0, "every plugin", ""),
        (("srve",), 2, "", "no command 'srve'.*did you mean serve"),
        (("--frob",), 2, "", "unknown flag --frob"),
        (("--traceback", "--version"), 0, "nybble ", ""),
        (("generate", "-p", "--traceback", "x"), 2, "", "-p/--prompt: expected one argument"),
        (("config", "show", "--", "--traceback"), 3, "", "no checkpoint folder .*--traceback"),
        (("config", "show", "/no/such"), 3, "", "no checkpoint folder /no/such"),
        (("config", "hide"), 2, "", "cannot 'hide'"),
        (("config",), 2, "", "required: show"),
        (("completion", "bsh"), 2, "", "no completion for shell 'bsh'.*did you mean bash"),
    ],
)
def test_outcomes(nybble: Run, argv: tuple[str, ...], code: int, out: str, err: str) -> None:
    got = nybble(*argv)
    assert got[0] == code
    assert out in got[1] and re.search(f"(?s){err}", got[2]), got
    assert ("Traceback (most" in got[2]) == (argv[-2:] == ("--traceback", "x"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NybbleError("told", fix="so"), 70, "error: told\n  fix:   so\n"),
        (CheckpointError("bad"), 3, "error: bad\n"),
        (OutOfMemoryError("much"), 4, "error: much\n"),
        (PortInUseError("taken"), 5, "error: taken\n"),
        (KeyError("x"), 70, "internal error: KeyError: 'x'\n  fix:   run it again with --traceback"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_exit_codes(
    nybble: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    got, _, err = nybble("env")
    assert got == code and err.startswith(words) and "Traceback" not in err
    if isinstance(error, Exception):
        assert "Traceback" in nybble("env", "--traceback")[2]


def test_a_plugin_adds_a_command(nybble: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nybble_cli(commands: Any) -> None:
        commands.add("greet", "say hello", "greeting:main")

    plugin = SimpleNamespace(NYBBLE_API=(1, 0), nybble_cli=hookimpl(nybble_cli))
    host = PluginHost.load(extra=[("greeter", plugin)])
    monkeypatch.setattr(PluginHost, "load", lambda: host)
    monkeypatch.setitem(sys.modules, "greeting", SimpleNamespace(main=lambda argv: len(argv)))  # type: ignore[misc]
    assert nybble("greet", "a", "--b")[0] == 2
    assert nybble("greet", "--traceback", "a", "--", "--traceback")[0] == 3
    assert "known: bench, chat, completion, config, demo, env, eval, experts, generate, greet" in nybble("unheard")[2]
