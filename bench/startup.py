"""`nybble bench startup`: from process start to ready, of `nybble serve` and of `LLM()`."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from ..engine.args import DEMO, DEMO_FORMS, setting
from ..engine.device import cuda_devices
from ..plugins.env import child_environment
from ..plugins.errors import NybbleError
from .command import make_parser, publish, read_settings, track
from .results import Metric, make_result

POLL_SECONDS = 0.005
STOP_SECONDS = 30.0
SHOWN_LINES = 15
SERVE = ("-m", "nybble", "serve")
OFFLINE = "import sys, nybble; llm = nybble.LLM(sys.argv[1]); print('ready', flush=True); llm.shutdown()"


@dataclass(frozen=True, kw_only=True)
class StartupArgs:
    """Cold: empty caches, nybble's and Triton's. Warm: those a cold start left. Files are in memory both times."""

    model: str = setting(DEMO, "checkpoint folder; nybble-demo is the embedded toy model", group="benchmark")
    repeats: int = setting(3, "starts of each kind", group="benchmark", low=1)
    timeout: float = setting(600.0, "seconds until a start has failed", group="benchmark", above=0)


def main(argv: list[str]) -> int:
    parser = make_parser(
        "startup",
        StartupArgs,
        "Time from process start to a server that answers /health, and to a ready LLM.",
    )
    parsed = parser.parse(argv)
    args = read_settings(StartupArgs, parsed)
    kinds: dict[str, Callable[[StartupArgs, str], float]] = {"serve": serve_seconds, "llm": llm_seconds}
    samples: dict[str, list[float]] = {f"{kind}_{heat}": [] for kind in kinds for heat in ("cold", "warm")}
    for _ in track(range(args.repeats), "startup"):
        for kind, seconds in kinds.items():
            with tempfile.TemporaryDirectory(prefix="nybble-bench-") as cache:
                for heat in ("cold", "warm"):
                    samples[f"{kind}_{heat}"].append(seconds(args, cache))
    metrics = {name: Metric.of(values, "s", better="lower") for name, values in samples.items()}
    result = make_result(
        "startup",
        argv,
        model=Path(args.model).name,
        toy_model=args.model in DEMO_FORMS,
        device="cuda" if cuda_devices()[0] else "cpu",
        workload={},
        metrics=metrics,
    )
    publish(result, parsed.output_json)
    return 0


def serve_seconds(args: StartupArgs, cache: str) -> float:
    """Seconds until `nybble serve` answers /health with 200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = [] if args.model == DEMO else [args.model]
    start = time.perf_counter()
    with _python([*SERVE, *model, "--port", str(port)], cache) as (process, log):
        while not healthy(port):
            _check(process, log, start, args.timeout)
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - start


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def llm_seconds(args: StartupArgs, cache: str) -> float:
    """Seconds until a new process has constructed `LLM(model)`."""
    return ready_seconds(["-c", OFFLINE, args.model], cache, args.timeout)


def ready_seconds(words: list[str], cache: str, timeout: float) -> float:
    """Seconds until a new Python process has printed the line "ready". Raises NybbleError when it never does."""
    start = time.perf_counter()
    with _python(words, cache) as (process, log):
        while b"ready\n" not in log.read_bytes():
            _check(process, log, start, timeout)
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - start


@contextmanager
def _python(words: list[str], cache: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A Python process whose output goes to a file; it is stopped at the end."""
    environment = child_environment(sys.path) | {"NYBBLE_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    with tempfile.NamedTemporaryFile(prefix="nybble-bench-", suffix=".log") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process, Path(log.name)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _check(process: subprocess.Popen[bytes], log: Path, start: float, timeout: float) -> None:
    late = time.perf_counter() - start > timeout
    if process.poll() is None and not late:
        return
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    raise NybbleError(
        f"it was not ready in {timeout:g} s" if late else f"it ended with exit code {process.returncode}",
        found="\n".join(lines) or "no output",
    )
