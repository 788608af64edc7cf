"""`nybble chat`: a conversation with a model in this process, or with --url on a server."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from ...plugins import env, log
from ...plugins.errors import EngineDeadError, NybbleError, RequestError, UsageError
from ..args import setting_fields
from ..settings import flag_name
from ..values import parse_value
from .client import Client
from .parser import Parser, add_engine_flags, engine_args, without_demo
from .sampling import add_sampling_flags, given_sampling, stream

if TYPE_CHECKING:
    from ..llm import LLM

Message = dict[str, Any]
Pieces = Generator[str, None, None]
Reply = Callable[[list[Message]], Pieces]
MAX_TOKENS = 512
COMMANDS = {"/exit": "leave (also Ctrl-D)", "/reset": "forget the conversation"}


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    group = parser.add_argument_group("conversation")
    group.add_argument("-q", "--quick", metavar="TEXT", help="ask this, print the answer and leave")
    group.add_argument("--system", metavar="TEXT", help="system message to begin with")
    group.add_argument("--url", metavar="URL", help="talk to this server (http://127.0.0.1:8000) instead")
    group.add_argument("--api-key", metavar="KEY", help="with --url: the server's key (or NYBBLE_API_KEY)")
    add_sampling_flags(parser, max_tokens=f"{MAX_TOKENS}; with --url, the server's")
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Hold the conversation until end of input; Ctrl-C ends one answer."""
    history: list[Message] = [{"role": "system", "content": parsed.system}] if parsed.system else []
    if parsed.url:
        return hold(_remote(parsed), history, parsed.quick)
    args, _ = engine_args(parsed)
    log.configure(default="WARNING")
    args = without_demo(args)
    from ..llm import LLM

    llm = LLM.from_engine_args(args)
    try:
        return hold(_local(llm, given_sampling(parsed, max_tokens=MAX_TOKENS)), history, parsed.quick)
    finally:
        llm.shutdown()


def _local(llm: LLM, sampling: dict[str, Any]) -> Reply:
    """Answers of a model in this process."""
    from ..request import RequestOutputKind

    params = llm.get_default_sampling_params().replace(output_kind=RequestOutputKind.DELTA, **sampling)
    numbers = itertools.count()

    def reply(history: list[Message]) -> Pieces:
        prompt = llm.get_tokenizer().apply_chat_template(history, add_generation_prompt=True)
        try:
            with closing(stream(llm.llm_engine, {f"chat-{next(numbers)}": prompt}, params)) as outputs:
                for output in outputs:
                    yield output.outputs[0].text
        except RequestError as error:
            # the engine's fix names request fields, which nobody can set here
            raise RequestError(error.asked, found=error.found, param=error.param, code=error.code) from error

    return reply


def _remote(parsed: Namespace) -> Reply:
    """Answers of a server. Raises UsageError for flags that are the server's own."""
    given = {name: value for name, value in vars(parsed).items() if name in setting_fields()}
    given.pop("model", None)
    seed = given.pop("seed", None)
    if given or parsed.config:
        name = flag_name(next(iter(given), "config"))
        raise UsageError(f"{name} is a setting of the server", fix="leave it out with --url")
    key = env.read_str("NYBBLE_API_KEY") if parsed.api_key is None else parsed.api_key
    client = Client(parsed.url, key)
    model = getattr(parsed, "model_path", getattr(parsed, "model", None)) or client.first_model()
    body = {"model": model, **given_sampling(parsed)}
    if seed is not None:
        body["seed"] = parse_value(setting_fields()["seed"], int, seed, "--seed")
    return lambda history: client.chat(body | {"messages": history})


def hold(reply: Reply, history: list[Message], question: str | None) -> int:
    """Answer one question, or those of stdin. Returns the exit code."""
    if question is None:
        return converse(reply, history)
    with closing(reply([*history, user(question)])) as answers:
        for piece in answers:
            print(piece, end="", flush=True)
    print()
    return 0


def converse(reply: Reply, history: list[Message]) -> int:
    """Answer what stdin asks until it ends; a message that is refused is told and dropped.

    Returns the exit code: of the last refusal when no person is there to have seen it, else 0.
    Raises EngineDeadError, after which there is nobody to ask.
    """
    start, prompt, code = list(history), "", 0
    person = sys.stdin.isatty()
    if person:
        prompt = "> "
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() its line editing
        print("; ".join(f"{name}: {help}" for name, help in COMMANDS.items()), file=sys.stderr)
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return code
        if text == "/exit":
            return code
        if text == "/reset":
            history = list(start)
        elif text.startswith("/"):
            print(f"no command {text!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        elif text:
            asked = [*history, user(text)]
            try:
                history = [*asked, {"role": "assistant", "content": answer(reply, asked)}]
            except EngineDeadError:
                raise
            except NybbleError as error:
                print(f"error: {error}\n  this message is dropped; /reset drops all", file=sys.stderr)
                code = 0 if person else error.exit_code


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(reply: Reply, history: list[Message]) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it and keeps what there is."""
    pieces: list[str] = []
    try:
        with suppress(KeyboardInterrupt), closing(reply(history)) as answers:
            for piece in answers:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except NybbleError:
        print(end="\n" if pieces else "", flush=True)
        raise
    print(flush=True)
    return "".join(pieces)
