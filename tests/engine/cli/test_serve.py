"""`nybble serve` hands on the right settings; the server itself is tested elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.engine.args import EngineArgs
from nybble.engine.server.args import ServerArgs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineArgs, ServerArgs]]:
    """What the server was started with; it exits with 143."""
    calls: list[tuple[EngineArgs, ServerArgs]] = []

    def serve(args: EngineArgs, server: ServerArgs) -> int:
        calls.append((args, server))
        return 143

    monkeypatch.setitem(sys.modules, "nybble.engine.server.app", SimpleNamespace(serve=serve))  # type: ignore[misc]
    return calls


@pytest.mark.parametrize(
    ("argv", "yaml", "environ", "server"),
    [
        ((), "", {}, {}),
        (("--host", "0.0.0.0", "--port=0"), "", {}, {"host": "0.0.0.0", "port": 0}),
        (("--uds", "/tmp/s"), "", {}, {"uds": "/tmp/s"}),
        (("--uds", "none"), "uds: /tmp/s", {"PORT": "9"}, {"port": 9}),
        ((), "", {"HOST": "h", "SSE_KEEPALIVE": "2"}, {"host": "h", "sse_keepalive": 2.0}),
        (
            ("--shutdown_timeout", "5", "--sse-keepalive", "1.5"),
            "",
            {},
            {"shutdown_timeout": 5.0, "sse_keepalive": 1.5},
        ),
        (("--disable-access-log",), "port: 9\nseed: 1", {}, {"disable_access_log": True, "port": 9}),
        (("--port", "7"), "port: 9", {"PORT": "8"}, {"port": 7}),
        (("--enable-log-requests",), "port: 9", {"PORT": "8"}, {"port": 8, "enable_log_requests": True}),
    ],
)
def test_server_settings(
    nybble: Run,
    served: list[tuple[EngineArgs, ServerArgs]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    yaml: str,
    environ: dict[str, str],
    server: dict[str, Any],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(f"NYBBLE_{name}", value)
    (tmp_path / "c.yaml").write_text(yaml)
    assert nybble("serve", "folder", "--config", str(tmp_path / "c.yaml"), *argv)[0] == 143
    args, got = served[0]
    assert got == ServerArgs(**server)
    assert (args.model, args.seed) == ("folder", 1 if "seed" in yaml else 0)


def test_keys_come_from_flags_file_and_environment(
    nybble: Run, served: list[tuple[EngineArgs, ServerArgs]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("c\n\n d \n")
    monkeypatch.setenv("NYBBLE_API_KEY", "e")
    _, _, err = nybble(
        "serve", "folder", "--api-key", "a", "--api-key", "b", "--api-key-file", str(tmp_path / "keys")
    )
    assert served[0][1].api_keys == ("a", "b", "c", "d", "e")
    assert "--api-key shows in the process list" in err and "'a'" not in repr(served[0][1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--port", "65536"), "--port must be at least 0 and at most 65535"),
        (("--port", "x"), "--port must be a whole number"),
        (("--uds", "/s", "--port", "1"), "listens on one address"),
        (("--api-key", ""), "API key must be printable ASCII"),
        (("--api-key", "a b"), "API key must be printable ASCII"),
        (("--api-key-file", "/dev/null"), "--api-key-file holds no key"),
        (("--api-key-file", "/no/such"), "--api-key-file: cannot read /no/such"),
        (("--shutdown-timeout", "-1"), "--shutdown-timeout must be at least 0"),
    ],
)
def test_refusals(
    nybble: Run, served: list[tuple[EngineArgs, ServerArgs]], argv: tuple[str, ...], words: str
) -> None:
    code, _, err = nybble("serve", "folder", *argv)
    assert (code, served) == (2, []) and words in err


@pytest.mark.parametrize("command", ["serve", "generate", "config"])
def test_every_command_knows_the_settings_of_the_server(
    nybble: Run,
    served: list[tuple[EngineArgs, ServerArgs]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    (tmp_path / "c.yaml").write_text("prot: 1\n")
    argv = ["show"] if command == "config" else []
    code, _, err = nybble(command, *argv, "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "unknown key prot in c.yaml" in err and "did you mean port?" in err
    monkeypatch.setenv("NYBBLE_PROT", "1")
    code, _, err = nybble(command, *argv)
    assert code == 2 and "did you mean NYBBLE_PORT?" in err and not served


def test_an_empty_key_variable_does_not_open_the_server(
    nybble: Run, served: list[tuple[EngineArgs, ServerArgs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_API_KEY", "")
    assert nybble("serve", "folder")[0] == 2 and not served


def test_the_demo_is_found_and_announced(nybble: Run, served: list[tuple[EngineArgs, ServerArgs]]) -> None:
    _, _, err = nybble("serve")
    assert Path(served[0][0].model, "config.json").is_file()
    assert "toy model" in err
