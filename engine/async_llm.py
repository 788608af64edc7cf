"""AsyncLLM: the asyncio front end of an engine in its own process; one stream per request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from ..plugins.errors import EngineDeadError, RequestError
from ..plugins.log import get_logger
from ..plugins.manager import PluginHost
from .args import EngineArgs
from .config import EngineConfig
from .core.client import EngineProcessHandle
from .core.messages import (
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
from .demo import resolve_demo
from .expert_stats import ExpertCounts, check_counting, check_experts
from .layer_report import AttentionReport, LayerReport
from .llm_engine import load_tokenizer, raise_refusal, servable_config
from .metrics import StepStats
from .plan import KVCacheLayout
from .request import EngineCoreOutput, RequestOutput, SamplingParams
from .text.input_processor import InputProcessor, PromptType
from .text.output_processor import OutputProcessor, merge_deltas

log = get_logger(__name__)

WATCH_SECONDS = 0.2
OFF_LOOP_CHARS = 4096
OUTPUTS_PER_TURN = 64


class Collector:
    """One request's pending output: what a slow reader has not taken yet is merged, never queued."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self.aborted = False

    def put(self, output: RequestOutput) -> None:
        self._output = output if self._output is None else merge_deltas(self._output, output)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()

    async def get(self) -> RequestOutput:
        """The next output, or the error that ended the request once every output before it was taken."""
        await self._arrived.wait()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._arrived.clear()
        return output


class AsyncLLM:
    """`async for output in engine.generate(...)`. `start` spawns the engine; `shutdown` ends it."""

    def __init__(self, config: EngineConfig, *, host: PluginHost | None = None) -> None:
        self.config, self.host = config, host
        self.tokenizer = load_tokenizer(config)
        self.layout: KVCacheLayout | None = None
        self.layers: tuple[LayerReport, ...] = ()
        self.attention: AttentionReport | None = None
        self.dead_error: EngineDeadError | None = None
        self._handle: EngineProcessHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._collectors: dict[str, Collector] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._listeners: list[Callable[[StepStats], None]] = []
        self._stats: StepStats | None = None
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromCore)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> AsyncLLM:
        args = resolve_demo(args)
        host = PluginHost.load(prefer=args.prefer, strict=args.strict_plugins)
        return cls(args.create_engine_config(host), host=host)

    async def start(self) -> None:
        """Spawn the engine process and wait until it is ready. Raises what it failed on."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._handle = EngineProcessHandle()
        try:
            self._socket.bind(self._handle.address)
            self._send(Start(self.config))
            ready = await self._first_message(self._handle)
            if isinstance(ready, Failed):
                raise ready.as_error()
            assert isinstance(ready, Ready)
            self.config = servable_config(self.config, ready.layout)
            self.input_processor = InputProcessor(self.config, self.tokenizer)
            self.output_processor = OutputProcessor(self.tokenizer)
        except BaseException:
            await self.shutdown(0.0)
            raise
        self.layout, self.layers, self.attention = ready.layout, ready.layers, ready.attention
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch(self._handle))]

    async def _first_message(self, handle: EngineProcessHandle) -> FromCore:
        while not await self._socket.poll(int(WATCH_SECONDS * 1000)):
            if handle.exit_code is not None and not await self._socket.poll(0):
                raise handle.death()
        return self._decoder.decode(await self._socket.recv())

    def _send(self, message: ToCore) -> None:
        """Queue a message; the socket has no high-water mark, so this never waits."""
        self._socket.send(self._encoder.encode(message))

    async def generate(
        self, prompt: PromptType, sampling_params: SamplingParams, request_id: str, *, priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream a request's outputs as `sampling_params.output_kind` says.

        Closing or cancelling the generator aborts the request. Raises RequestError before the first output when it is
        refused, EngineDeadError when the engine is gone.
        """
        collector = await self._add(prompt, sampling_params, request_id, priority, cache_salt)
        finished = False
        try:
            while not finished:
                output = await collector.get()
                finished = output.finished
                raise_refusal(output)
                yield output
        finally:
            self._collectors.pop(request_id, None)
            if not finished:
                self._abort([request_id])

    async def _add(self, prompt: PromptType, params: SamplingParams, request_id: str, priority: int,
                   cache_salt: str | None) -> Collector:
        if self.dead_error is not None:
            raise self.dead_error
        if request_id in self._collectors:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        collector = self._collectors[request_id] = Collector()
        try:
            text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
            if isinstance(text, str) and len(text) > OFF_LOOP_CHARS:
                processed = await asyncio.to_thread(self.input_processor.process, request_id, prompt, params,
                                                    priority=priority, cache_salt=cache_salt,
                                                    arrival_time=time.monotonic())
            else:
                processed = self.input_processor.process(request_id, prompt, params, priority=priority,
                                                         cache_salt=cache_salt, arrival_time=time.monotonic())
            if self.dead_error is not None:  # it died while a thread tokenized
                raise self.dead_error
            children = self.output_processor.add_request(processed)
        except BaseException:
            del self._collectors[request_id]
            raise
        if collector.aborted:  # while a thread tokenized
            await self.abort(request_id)
        else:
            for child in children:
                self._send(Add([child]))
        return collector

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort"."""
        if (collector := self._collectors.get(request_id)) is not None:
            collector.aborted = True
        for output in self._abort([request_id]):
            if (collector := self._collectors.get(output.request_id)) is not None:
                collector.put(output)

    def _abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        outputs, core_ids = self.output_processor.abort(request_ids)
        if core_ids and self.dead_error is None:
            self._send(Abort(core_ids))
        return outputs

    async def _receive(self) -> None:
        """Hand each message on; the only reader of the socket. Without it nobody would ever hear of anything, so
        whatever it fails on ends the engine."""
        try:
            while True:
                await self._handle_message(self._decoder.decode(await self._socket.recv()))
        except Exception as error:
            log.exception("the front end failed")
            self._die(EngineDeadError(f"the front end failed on {type(error).__name__}: {error}"))

    async def _handle_message(self, message: FromCore) -> None:
        if isinstance(message, Outputs):
            await self._dispatch(message.outputs)
            self._stats = message.stats
            for listener in self._listeners:
                try:
                    listener(message.stats)
                except Exception:
                    log.exception("a stats listener failed and is dropped")
                    self._listeners.remove(listener)
                    break
        elif isinstance(message, Reply | ExpertReply):
            call = self._calls.pop(message.call_id, None)
            if call is not None and not call.done():
                call.set_result(message.value)
        elif isinstance(message, Failed):
            error = message.as_error()
            self._die(error if isinstance(error, EngineDeadError) else EngineDeadError(str(error)))

    async def _dispatch(self, outputs: list[EngineCoreOutput]) -> None:
        """Process a step's outputs a few at a time, so that a large batch does not hold the event loop."""
        for at in range(0, len(outputs), OUTPUTS_PER_TURN):
            processed = self.output_processor.process(outputs[at : at + OUTPUTS_PER_TURN], time.monotonic())
            for output in processed.request_outputs:
                if (collector := self._collectors.get(output.request_id)) is not None:
                    collector.put(output)
            if processed.abort_ids:
                self._send(Abort(processed.abort_ids))
            await asyncio.sleep(0)

    async def _watch(self, handle: EngineProcessHandle) -> None:
        """See the process die within WATCH_SECONDS, whether or not it could say why."""
        while handle.exit_code is None:
            await asyncio.sleep(WATCH_SECONDS)
        await asyncio.sleep(WATCH_SECONDS)  # a Failed message that says why may still be in the socket
        self._die(handle.death())

    def _die(self, error: EngineDeadError) -> None:
        if self.dead_error is not None:
            return
        log.error("%s", error)
        self.output_processor.fail_all(str(error))
        self._fail_everyone(error)

    def _fail_everyone(self, error: EngineDeadError) -> None:
        """Tell every stream and call that waits, and whoever comes later."""
        self.dead_error = error
        for collector in self._collectors.values():
            collector.fail(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    @property
    def is_running(self) -> bool:
        return self.layout is not None and self.dead_error is None

    @property
    def num_unfinished(self) -> int:
        return len(self._collectors)

    def default_sampling_params(self) -> dict[str, Any]:
        """What the checkpoint's generation_config suggests, by SamplingParams field."""
        return self.input_processor.default_sampling_params()

    def latest_stats(self) -> StepStats | None:
        return self._stats

    def add_stats_listener(self, listener: Callable[[StepStats], None]) -> None:
        """Call `listener` with the stats of every step."""
        self._listeners.append(listener)

    async def reset_prefix_cache(self) -> bool:
        return await self._call(ResetPrefixCache(next(self._call_ids)))

    async def expert_counts(self, reset: bool = False) -> list[ExpertCounts]:
        """As LLMEngine's; answered between two steps."""
        check_counting(self.config.device.expert_stats)
        return check_experts(await self._call(AskExperts(next(self._call_ids), reset)))

    async def _call(self, question: ResetPrefixCache | AskExperts) -> Any:
        """The value of the engine's reply. Raises EngineDeadError."""
        if self.dead_error is not None:
            raise self.dead_error
        call = self._calls[question.call_id] = asyncio.get_running_loop().create_future()
        self._send(question)
        return await call

    async def shutdown(self, timeout: float = 5.0) -> None:
        """End the engine process: `timeout` seconds to finish its step, then killed. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        running = self.layout is not None and self.dead_error is None
        if running:
            self._send(Shutdown())
        await asyncio.to_thread(handle.stop, timeout if running else 0.0)
        if self.dead_error is None:
            self._fail_everyone(EngineDeadError("the engine was shut down"))
        self._socket.close()
        self._context.term()
