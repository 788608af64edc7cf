"""The engine process: `python -m nybble.engine.core.proc ADDRESS` connects, is told its config, and serves."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback

import msgspec
import zmq

from ...plugins.log import configure, get_logger
from ...plugins.manager import PluginHost
from .engine_core import EngineCore
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

log = get_logger(__name__)
PR_SET_PDEATHSIG = 1


class EngineProcess:
    """The loop around an EngineCore that hears its front end over one ZMQ socket."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.connect(address)
        self.encoder, self.decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToCore)

    def send(self, message: FromCore) -> None:
        self.socket.send(self.encoder.encode(message))

    def receive(self) -> ToCore:
        return self.decoder.decode(self.socket.recv())

    def run(self) -> int:
        """Serve until told to stop. Returns the exit code; whatever goes wrong is sent before it ends."""
        try:
            start = self.receive()
            assert isinstance(start, Start)
            plugins = start.config.plugins
            host = PluginHost.load(prefer=plugins.prefer, strict=plugins.strict)
            core = EngineCore(start.config, host)
            self.send(Ready(core.layout))
            self._serve(core)
            core.shutdown()
            return 0
        except Exception as error:
            log.debug("the engine process failed", exc_info=True)
            text = str(error) or repr(error)
            if not hasattr(error, "exit_code"):
                text += "\n" + "".join(traceback.format_tb(error.__traceback__)[-4:])
            self.send(Failed(type(error).__name__, text))
            return 1
        finally:
            self.socket.close()
            self.context.term()

    def _serve(self, core: EngineCore) -> None:
        while True:
            while not core.has_work() or self.socket.poll(0):
                message = self.receive()
                if isinstance(message, Add):
                    for request in message.requests:
                        core.add_request(request)
                elif isinstance(message, Abort):
                    core.abort_requests(message.request_ids)
                elif isinstance(message, ResetPrefixCache):
                    self.send(Reply(message.call_id, core.reset_prefix_cache()))
                elif isinstance(message, Shutdown):
                    return
            self.send(Outputs(core.step(), core.stats))


def die_with_parent() -> None:
    """Never outlive the front end: the kernel's death signal where there is one, end of stdin everywhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1024):
            continue
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    die_with_parent()
    # Ctrl-C in a terminal reaches the whole process group; the front end decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure(prefix="[engine] ")
    return EngineProcess(sys.argv[1]).run()


if __name__ == "__main__":
    raise SystemExit(main())
