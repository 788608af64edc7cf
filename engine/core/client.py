"""How a front end talks to an EngineCore: in this process, or in its own over ZMQ, behind one interface."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import msgspec

from ...plugins.env import child_environment
from ...plugins.errors import EngineDeadError
from ...plugins.manager import PluginHost
from ..config import EngineConfig
from ..metrics import StepStats
from ..plan import KVCacheLayout
from ..request import EngineCoreOutput, EngineCoreRequest
from .messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    Add,
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


class EngineCoreClient(ABC):
    """The synchronous interface that LLMEngine drives."""

    layout: KVCacheLayout
    stats: StepStats

    @abstractmethod
    def add_requests(self, requests: list[EngineCoreRequest]) -> None: ...

    @abstractmethod
    def abort_requests(self, request_ids: list[str]) -> None: ...

    @abstractmethod
    def get_outputs(self) -> list[EngineCoreOutput]:
        """Run or await one step. Raises EngineDeadError when the engine is gone."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool: ...

    @abstractmethod
    def shutdown(self) -> None: ...


class InprocClient(EngineCoreClient):
    """Calls the core directly."""

    def __init__(self, config: EngineConfig, host: PluginHost) -> None:
        from .engine_core import EngineCore  # the one import here that brings torch; a process client needs none

        self.core = EngineCore(config, host)
        self.layout, self.stats = self.core.layout, StepStats()
        self._dead: str | None = None

    def add_requests(self, requests: list[EngineCoreRequest]) -> None:
        for request in requests:
            self.core.add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.core.abort_requests(request_ids)

    def get_outputs(self) -> list[EngineCoreOutput]:
        if self._dead:
            raise EngineDeadError(f"the engine stopped earlier: {self._dead}", fix="make a new one")
        try:
            outputs = self.core.step()
        except Exception as error:
            self._dead = repr(error)
            raise
        self.stats = self.core.stats
        return outputs

    def reset_prefix_cache(self) -> bool:
        return self.core.reset_prefix_cache()

    def shutdown(self) -> None:
        self.core.shutdown()


class EngineProcessHandle:
    """A running engine process and the address it serves; shared by the sync and the asyncio client.

    The socket lives in a folder that only this user may enter. `stop` ends the process, gently first.
    """

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="nybble-")  # mkdtemp makes it 0700
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
        if self.process.stdin is not None and not self.process.stdin.closed:
            try:
                self.process.wait(timeout=grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdin.close()
        self.folder.cleanup()


class ProcClient(EngineCoreClient):
    """Drives an EngineCore in a process of its own, synchronously."""

    def __init__(self, config: EngineConfig) -> None:
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromCore)
        self._call_ids = itertools.count()
        self._pending: list[EngineCoreOutput] = []
        self.stats = StepStats()
        self.handle = EngineProcessHandle()
        self._socket.bind(self.handle.address)
        try:
            self._send(Start(config))
            ready = self._receive()
            assert isinstance(ready, Ready)
            self.layout = ready.layout
        except BaseException:
            self.shutdown()
            raise

    def _send(self, message: ToCore) -> None:
        self._socket.send(self._encoder.encode(message))

    def _receive(self) -> FromCore:
        """The next message. Raises what the process failed on, or EngineDeadError when it is gone without a word."""
        while not self._socket.poll(POLL_MS):
            if self.handle.exit_code is not None and not self._socket.poll(0):
                raise self.handle.death()
        message: FromCore = self._decoder.decode(self._socket.recv())
        if isinstance(message, Failed):
            raise message.as_error()
        return message

    def add_requests(self, requests: list[EngineCoreRequest]) -> None:
        self._send(Add(requests))

    def abort_requests(self, request_ids: list[str]) -> None:
        self._send(Abort(request_ids))

    def get_outputs(self) -> list[EngineCoreOutput]:
        if self._pending:
            outputs, self._pending = self._pending, []
            return outputs
        message = self._receive()
        assert isinstance(message, Outputs)
        self.stats = message.stats
        return message.outputs

    def reset_prefix_cache(self) -> bool:
        self._send(ResetPrefixCache(next(self._call_ids)))
        while not isinstance(message := self._receive(), Reply):
            assert isinstance(message, Outputs)
            self._pending.extend(message.outputs)
        return message.value

    def shutdown(self) -> None:
        if self.handle.exit_code is None:
            self._send(Shutdown())
        self.handle.stop()
        self._socket.close()
        self._context.term()
