"""The application: routes, and `serve`, which runs it from the first signal handler to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...plugins.errors import UsageError
from ...plugins.log import get_logger
from .._version import __version__
from ..expert_stats import as_json
from ..layer_report import render, summary
from .api import Api, Engine, Heartbeat, Limits, json_response
from .args import ServerArgs
from .auth import ApiKeys
from .chat import create_chat_completion
from .completions import create_completion
from .connection import connection_class
from .errors import ApiError, to_api_error
from .expert_metrics import ExpertMetrics
from .lifecycle import Lifecycle, Phase
from .listen import listening, url
from .metrics import ServerMetrics
from .middleware import Edge
from .protocol import ModelCard
from .tokenize import detokenize, tokenize

if TYPE_CHECKING:
    from ...plugins.manager import PluginHost
    from ..args import EngineArgs

logger = get_logger(__name__)
TOY = "a toy model: it answers a few small tasks and is no language model"
WATCH_SECONDS = 0.2
SHUTDOWN_SECONDS = 1.0
STALL_SECONDS = 10.0
"""How long one step may take before /health calls the engine stalled."""
ANSWER_SECONDS = 10.0
"""How long the engine may take to say what it counted: it answers between two steps."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections, so that none is closed under a request that is on its way."""


def build_app(
    engine: Engine,
    args: ServerArgs,
    *,
    host: PluginHost | None = None,
    lifecycle: Lifecycle | None = None,
    limits: Limits | None = None,
) -> Starlette:
    """The server as an ASGI application, without sockets or signals. `lifecycle` None: ready at once."""
    name = engine.config.model.served_model_name
    api = Api(
        engine=engine,
        args=args,
        lifecycle=lifecycle or Lifecycle(),
        metrics=ServerMetrics(name),
        experts=ExpertMetrics(name, engine.expert_counts) if engine.config.device.expert_stats else None,
        heartbeat=Heartbeat(engine),
        keys=ApiKeys(args.api_keys),
        limits=limits or Limits(),
        created=int(time.time()),
    )
    engine.add_stats_listener(api.metrics.on_step)
    if api.experts is not None:
        api.metrics.registry.register(api.experts)
    get = {
        "/v1/models": list_models,
        "/v1/models/{model:path}": get_model,
        "/health": health,
        "/ping": health,
        "/version": version,
        "/nybble/layers": layers,
        "/nybble/experts": experts,
        "/load": load,
        "/metrics": metrics,
    }
    post = {
        "/v1/completions": create_completion,
        "/v1/chat/completions": create_chat_completion,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/nybble/experts/reset": reset_experts,
    }
    app = Starlette(
        routes=[
            *(Route(path, partial(handler, api), methods=["GET"]) for path, handler in get.items()),
            *(Route(path, partial(handler, api), methods=["POST"]) for path, handler in post.items()),
        ],
        middleware=[Middleware(Edge, api=api)],
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False
    app.state.api = api
    if host is not None:
        host.add_routes(app)
    return app


async def _no_route(request: Request, exc: Exception) -> Response:
    return to_api_error(exc).response()


async def list_models(api: Api, request: Request) -> Response:
    return json_response({"object": "list", "data": [_card(api)]})


async def get_model(api: Api, request: Request) -> Response:
    api.check_model(request.path_params["model"])
    return json_response(_card(api))


def _card(api: Api) -> ModelCard:
    model = api.engine.config.model
    card = ModelCard(id=api.model_name, created=api.created, max_model_len=model.max_model_len)
    if model.is_demo:
        card.demo, card.description = True, TOY
    return card


async def health(api: Api, request: Request) -> Response:
    """200 when a request sent now would be served."""
    api.lifecycle.check_open()
    if api.engine.errored or not api.engine.is_running:
        raise ApiError(503, "the engine stopped; the server's log says why", code="engine_dead")
    if (silent := api.heartbeat.silent_seconds) > STALL_SECONDS:
        raise ApiError(503, f"the engine has made no step for {silent:.0f} s", code="engine_stalled")
    return Response()


async def version(api: Api, request: Request) -> Response:
    return json_response({"version": __version__})


async def layers(api: Api, request: Request) -> Response:
    """The load report: every linear layer, its kernel, how attention is computed, and why not otherwise."""
    return json_response({"layers": api.engine.layers, "attention": api.engine.attention})


async def experts(api: Api, request: Request) -> Response:
    """The tokens of every expert, by layer."""
    return await _experts(api, reset=False)


async def reset_experts(api: Api, request: Request) -> Response:
    """The same, and the counts begin anew: no token is in two answers, and in none only after a 503."""
    return await _experts(api, reset=True)


async def _experts(api: Api, *, reset: bool) -> Response:
    try:
        counted = await asyncio.wait_for(api.engine.expert_counts(reset), ANSWER_SECONDS)
    except UsageError as error:
        raise ApiError(404, str(error), code="no_expert_counts") from error
    except TimeoutError as error:
        raise ApiError(503, f"the engine did not answer in {ANSWER_SECONDS:.0f} s", code="engine_stalled") from error
    return Response(as_json(counted), media_type="application/json")


async def load(api: Api, request: Request) -> Response:
    return json_response({"server_load": len(api.lifecycle.generating)})


async def metrics(api: Api, request: Request) -> Response:
    if api.experts is not None and api.engine.is_running:
        await api.experts.refresh()
    return Response(api.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def serve(args: EngineArgs, server: ServerArgs) -> int:
    """Listen, load, serve until a signal or the engine's death; the process's exit code.

    143 after SIGTERM, 130 after SIGINT, 1 when the engine died. Raises NybbleError when it cannot start.
    """
    from ..async_llm import AsyncLLM  # after the address is known to be free, since it imports torch

    with listening(server) as sock:
        if (
            not server.api_keys
            and server.uds is None
            and server.host not in ("127.0.0.1", "::1", "localhost")
        ):
            logger.warning("anyone who reaches %s can use this server: no API key is set", server.host)
        engine = AsyncLLM.from_engine_args(args)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(engine, server, sock, host=engine.host))


class _Web(uvicorn.Server):
    """uvicorn without its own signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def web_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """The web server of `app`, to be run on a socket that is already bound. It logs nothing: the app does."""
    return _Web(
        uvicorn.Config(
            app,
            http=connection_class(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.head_bytes,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        )
    )


class _Signals:
    """The first SIGTERM or SIGINT asks for a stop, the second for one at once."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle, self.exit_code = lifecycle, 0
        self.stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: int) -> None:
        if self.stop.is_set():
            self.lifecycle.hurry()
        self.exit_code = self.exit_code or 128 + number
        self.stop.set()


async def run(
    engine: Engine, server: ServerArgs, sock: socket.socket, *, host: PluginHost | None = None
) -> int:
    """Serve `engine` on `sock`: 503 while it loads, then requests, then the drain. `serve`'s exit code."""
    lifecycle = Lifecycle(Phase.LOADING)
    signals = _Signals(lifecycle)
    limits = Limits()
    app = build_app(engine, server, host=host, lifecycle=lifecycle, limits=limits)
    web = web_server(app, limits)
    serving = asyncio.create_task(web.serve(sockets=[sock]))
    try:
        if not await _load(engine, signals.stop):
            return signals.exit_code
        lifecycle.phase = Phase.READY
        if (form := engine.config.load.report) is not None:
            print(render(engine.layers, engine.attention, form), flush=True)
        sys.stderr.write(banner(engine, url(server, sock)))
        await _watch(engine, signals.stop, serving, app.state.api.metrics)
        if engine.errored:
            logger.error("the engine stopped; closing")
            await lifecycle.farewell()
            return 1
        logger.info("draining: %d requests have %g s to finish", lifecycle.in_flight, server.shutdown_timeout)
        await lifecycle.drain(server.shutdown_timeout)
        return signals.exit_code
    finally:
        web.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.shutdown(SHUTDOWN_SECONDS), SHUTDOWN_SECONDS + 0.5)
        await serving


async def _load(engine: Engine, stop: asyncio.Event) -> bool:
    """Start the engine; False when a signal came first. Raises what the engine raises."""
    loading, stopping = asyncio.ensure_future(engine.start()), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        return loading.done() and not stop.is_set()
    finally:
        stopping.cancel()
        loading.cancel()
        await asyncio.gather(loading, stopping, return_exceptions=True)


async def _watch(
    engine: Engine, stop: asyncio.Event, serving: asyncio.Task[None], metrics: ServerMetrics
) -> None:
    """Return when a signal came, the engine died or the web server ended; measure the loop's lag."""
    while not (stop.is_set() or engine.errored or serving.done()):
        before = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), WATCH_SECONDS)
        lag = max(0.0, time.monotonic() - before - WATCH_SECONDS)
        metrics.loop_lag.set(lag)
        if lag > 1.0:
            logger.warning("the server's event loop stood still for %.1f s", lag)


def banner(engine: Engine, address: str) -> str:
    """What is served and how to try it."""
    config = engine.config
    model, scheduler = config.model, config.scheduler
    cache = "" if engine.layout is None else f", KV cache of {engine.layout.max_tokens} tokens"
    toy = f"\n  {TOY}" if model.is_demo else ""
    where = "--unix-socket {0} http://nybble" if address.startswith("unix:") else "{0}"
    target = where.format(address.removeprefix("unix:"))
    return (
        f"nybble {__version__} serves {model.served_model_name} on {address}{toy}\n"
        f"  {model.architecture} in {model.dtype} on {config.device.device}, "
        f"context of {model.max_model_len} tokens{cache}, at most {scheduler.max_num_seqs} requests at once\n"
        f"  {model.quantization or 'not quantized'}; linear layers: {summary(engine.layers) or 'none'}\n"
        f"  attention: {engine.attention or 'not said'}\n"
        f'  curl {target}/v1/completions -d \'{{"prompt": "Hello", "max_tokens": 16}}\'\n'
    )
