"""The engine process: `python -m nybble.engine.core.proc ADDRESS` connects, is told its config, and serves."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback

import msgspec
import zmq

from ...plugins.log import configure, get_logger
from ...plugins.manager import PluginHost
from ..metrics import StepStats
from ..request import EngineCoreOutput
from .engine_core import EngineCore
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

log = get_logger(__name__)
WATCH_SECONDS = 1.0


class EngineProcess:
    """The loop around an EngineCore that hears its front end over one ZMQ socket."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.connect(address)
        self.encoder, self.decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToCore)

    def send(self, message: FromCore) -> None:
        self.socket.send(self.encoder.encode(message))

    def send_outputs(self, outputs: list[EngineCoreOutput], stats: StepStats) -> None:
        """Send a step's outputs in as many messages as their size takes; one that fits in none ends with an error."""
        data = self.encoder.encode(Outputs(outputs, stats))
        if len(data) <= MAX_MESSAGE_BYTES:
            self.socket.send(data)
        elif len(outputs) > 1:
            self.send_outputs(outputs[: len(outputs) // 2], stats)
            self.send_outputs(outputs[len(outputs) // 2 :], stats.levels())
        else:
            text = f"one step's output has {len(data)} bytes, more than the {MAX_MESSAGE_BYTES} of a message"
            self.core.abort_requests([outputs[0].request_id])
            self.send_outputs([EngineCoreOutput(request_id=outputs[0].request_id, new_token_ids=[],
                                                finish_reason="error", error=f"{text}: ask for fewer logprobs")], stats)

    def receive(self) -> ToCore:
        return self.decoder.decode(self.socket.recv())

    def run(self) -> int:
        """Serve until told to stop. Returns the exit code; whatever goes wrong is sent before it ends."""
        try:
            start = self.receive()
            assert isinstance(start, Start)
            plugins = start.config.plugins
            host = PluginHost.load(prefer=plugins.prefer, strict=plugins.strict)
            self.core = EngineCore(start.config, host)
            self.send(Ready(self.core.layout, self.core.layers, self.core.attention))
            self._serve(self.core)
            self.core.shutdown()
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
                elif isinstance(message, AskExperts):
                    self.send(ExpertReply(message.call_id, core.expert_counts(message.reset)))
                elif isinstance(message, Shutdown):
                    return
            outputs = core.step()
            self.send_outputs(outputs, core.stats)


def die_with_parent() -> None:
    """Never outlive the front end: end when its end of our stdin closes, or when we are somebody else's child.

    Not by the kernel's PDEATHSIG: that one fires when the *thread* that made us ends.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], WATCH_SECONDS)
            if readable and not os.read(0, 1024):
                break
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
