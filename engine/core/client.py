"""How a front end talks to an EngineCore: in this process, or in its own over ZMQ, behind one interface."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import msgspec

from ...plugins.env import child_environment
from ...plugins.errors import EngineDeadError, NybbleError
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..expert_stats import ExpertCounts
from ..layer_report import AttentionReport, LayerReport
from ..metrics import StepStats
from ..plan import KVCacheLayout
from ..request import EngineCoreOutput, EngineCoreRequest
from .messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    Add,
    AskExperts,
    ExpertReply,
    Failed,
    FromCore,
    Outputs,
    Ready,
    Reply,
    ResetPrefixCache,
    Shutdown,
    Start,
    ToCore,
)

STOP_SECONDS = 5.0
POLL_MS = 200
# A Unix socket's path has at most 107 bytes on Linux and 103 on macOS.
MAX_SOCKET_PATH = 103


class EngineCoreClient(ABC):
    """The synchronous interface that LLMEngine drives."""

    layout: KVCacheLayout
    layers: tuple[LayerReport, ...]
    attention: AttentionReport | None
    stats: StepStats

    @abstractmethod
    def add_requests(self, requests: list[EngineCoreRequest]) -> None: ...

    @abstractmethod
    def abort_requests(self, request_ids: list[str]) -> None:
        """Forget requests; does nothing when the engine is gone."""

    @abstractmethod
    def get_outputs(self) -> list[EngineCoreOutput]:
        """Run or await one step. Raises EngineDeadError when the engine is gone."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool: ...

    @abstractmethod
    def expert_counts(self, reset: bool) -> list[ExpertCounts]: ...

    @abstractmethod
    def shutdown(self) -> None:
        """Release the engine. Idempotent."""


class InprocClient(EngineCoreClient):
    """Calls the core directly."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        from .engine_core import EngineCore  # the one import here that brings torch; a process client needs none

        self.core = EngineCore(config, host)
        self.layout, self.layers, self.attention = self.core.layout, self.core.layers, self.core.attention
        self.stats = StepStats()
        self._dead: str | None = None
        self._held: list[EngineCoreOutput] = []

    def add_requests(self, requests: list[EngineCoreRequest]) -> None:
        for request in requests:
            self.core.add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.core.abort_requests(request_ids)

    def get_outputs(self) -> list[EngineCoreOutput]:
        if self._dead:
            raise EngineDeadError(f"the engine stopped earlier: {self._dead}", fix="make a new one")
        if not self._held:
            with late_interrupt() as interrupt:
                try:
                    self._held = self.core.step()
                except Exception as error:
                    self._dead = repr(error)
                    raise
                self.stats = self.core.stats
            interrupt()  # what the step produced is held for the next call
        outputs, self._held = self._held, []
        return outputs

    def reset_prefix_cache(self) -> bool:
        return self.core.reset_prefix_cache()

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        return self.core.expert_counts(reset)

    def shutdown(self) -> None:
        self.core.shutdown()


@contextlib.contextmanager
def late_interrupt() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back while the block runs; the function it gives, called after, lets a held one happen.

    A step that stops half-way leaves the scheduler and the workers in disagreement, and the engine could not go on.
    Only the main thread is ever interrupted.
    """
    held: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield lambda: handler(*held[0]) if held and callable(handler) else None
    finally:
        signal.signal(signal.SIGINT, handler)


class EngineProcessHandle:
    """A running engine process and the address it connects to; shared by the sync and the asyncio client.

    The socket lives in a folder that only this user may enter. `stop` ends the process, gently first.
    """

    def __init__(self) -> None:
        self.folder = socket_folder()
        self.address = f"ipc://{self.folder.name}/core"
        command = [sys.executable, "-m", "nybble.engine.core.proc", self.address]
        package_root = str(Path(__file__).absolute().parents[3])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE,
                                        env=child_environment([package_root, *sys.path]))

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def death(self) -> EngineDeadError:
        code = self.process.wait(timeout=STOP_SECONDS)
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EngineDeadError("the engine process died", found=cause,
                               fix="its log is above; -9 is usually the system being out of memory")

    def stop(self, grace: float = STOP_SECONDS) -> None:
        """Wait `grace` seconds for it to end by itself, then kill it. Idempotent."""
        try:
            self.process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.folder.cleanup()


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder of mode 0700 whose path leaves room for a socket's name, wherever TMPDIR points."""
    folder = tempfile.TemporaryDirectory(prefix="nybble-")
    if len(f"{folder.name}/core".encode()) > MAX_SOCKET_PATH:
        folder.cleanup()
        folder = tempfile.TemporaryDirectory(prefix="nybble-", dir="/tmp")
    return folder


class ProcClient(EngineCoreClient):
    """Drives an EngineCore in a process of its own, synchronously."""

    def __init__(self, config: EngineConfig) -> None:
        import zmq

        self._zmq = zmq
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # two full queues, each waiting for the other's reader, would hang
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromCore)
        self._call_ids = itertools.count()
        self._pending: list[EngineCoreOutput] = []
        self._dead: NybbleError | None = None
        self.stats = StepStats()
        self.handle = EngineProcessHandle()
        try:
            self._socket.bind(self.handle.address)
            self._send(Start(config))
            ready = self._receive()
            assert isinstance(ready, Ready)
            self.layout, self.layers, self.attention = ready.layout, ready.layers, ready.attention
        except BaseException:
            self.handle.process.kill()
            self.shutdown()
            raise

    def _send(self, message: ToCore) -> None:
        """Queue a message. Raises EngineDeadError: a socket without a peer would wait for ever."""
        data = self._encoder.encode(message)
        while True:
            self._check_alive()
            try:
                self._socket.send(data, self._zmq.NOBLOCK)
                return
            except self._zmq.Again:
                self._socket.poll(POLL_MS, self._zmq.POLLOUT)

    def _receive(self) -> FromCore:
        """The next message. Raises what the process failed on, or EngineDeadError when it is gone without a word."""
        if self._dead is not None:
            raise self._dead
        while not self._socket.poll(POLL_MS):
            self._check_alive()
        message: FromCore = self._decoder.decode(self._socket.recv())
        if isinstance(message, Failed):
            self._dead = message.as_error()
            raise self._dead
        return message

    def _check_alive(self) -> None:
        if self._dead is None and self.handle.exit_code is not None:
            self._dead = self._last_words()
        if self._dead is not None:
            raise self._dead

    def _last_words(self) -> NybbleError:
        """Why a process that is gone is gone: what it still said, else how it ended."""
        while self._socket.poll(0):
            message: FromCore = self._decoder.decode(self._socket.recv())
            if isinstance(message, Failed):
                return message.as_error()
            if isinstance(message, Outputs):
                self._take(message)
        return self.handle.death()

    def add_requests(self, requests: list[EngineCoreRequest]) -> None:
        for request in requests:
            self._send(Add([request]))

    def abort_requests(self, request_ids: list[str]) -> None:
        with contextlib.suppress(NybbleError):  # a dead engine has forgotten them
            self._send(Abort(request_ids))

    def get_outputs(self) -> list[EngineCoreOutput]:
        while not self._pending:
            message = self._receive()
            if isinstance(message, Outputs):  # else the late reply to a call that was interrupted
                self._take(message)
                break
        outputs, self._pending = self._pending, []
        return outputs

    def _take(self, message: Outputs) -> None:
        self._pending.extend(message.outputs)
        self.stats = message.stats

    def reset_prefix_cache(self) -> bool:
        reply = self._call(ResetPrefixCache(next(self._call_ids)))
        assert isinstance(reply, Reply)
        return reply.value

    def expert_counts(self, reset: bool) -> list[ExpertCounts]:
        reply = self._call(AskExperts(next(self._call_ids), reset))
        assert isinstance(reply, ExpertReply)
        return reply.value

    def _call(self, question: ResetPrefixCache | AskExperts) -> Reply | ExpertReply:
        """The answer to a question; outputs that come before it are held for the next step."""
        self._send(question)
        while True:
            message = self._receive()
            if isinstance(message, Outputs):
                self._take(message)
            elif isinstance(message, Reply | ExpertReply) and message.call_id == question.call_id:
                return message

    def shutdown(self) -> None:
        if self._socket.closed:
            return
        with contextlib.suppress(NybbleError):
            self._send(Shutdown())
        self.handle.stop()
        self._socket.close()
        self._context.term()
        self._dead = self._dead or EngineDeadError("the engine was shut down")
