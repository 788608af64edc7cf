"""Chat templates: where a checkpoint keeps them, and conversations rendered through them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jinja2 import Template, TemplateSyntaxError

from ...plugins.errors import CheckpointError, RequestError
from .template_sandbox import BUDGET, MAX_CHARS, Budget, TemplateEnvironment, TemplateLimitError

RENDER_SECONDS = 2.0
MAX_TEMPLATE_CHARS = 1 << 20
PROBE = "nybble probe"
CUT = "\ue000cut here\ue000"

RESERVED = frozenset({"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
                      "continue_final_message", "raise_exception", "strftime_now"})


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint by name ("default" is the usual one), {} when it has none.

    Newest convention first: chat_template.jinja with additional_chat_templates/ (or chat_templates/), then
    chat_template.json, then the entry of tokenizer_config.json, which is one text or a list of named ones.
    Raises CheckpointError for a file that cannot be read.
    """
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    for name in ("additional_chat_templates", "chat_templates"):
        files.update({path.stem: path for path in sorted((folder / name).glob("*.jinja"))})
    if files:
        return {name: _read(path) for name, path in files.items()}
    legacy = folder / "chat_template.json"
    entry = tokenizer_config.get("chat_template")
    if legacy.is_file():
        try:
            entry = json.loads(_read(legacy))["chat_template"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{legacy} has no chat_template", found=repr(error)) from error
    if isinstance(entry, list):
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
    found = entry if isinstance(entry, dict) else {"default": entry} if entry else {}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise CheckpointError(f"{folder}: chat_template must be a text or a list of named texts",
                              found=type(tokenizer_config.get("chat_template")).__name__)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}", found=error) from error


class _Compiled(NamedTuple):
    """`wants_parts`: the template shows a message's text only when its content is a list of parts."""

    template: Template
    wants_parts: bool = False


class ChatRenderer:
    """Renders conversations with the templates of one checkpoint.

    Args:
        templates: sources by name. "tool_use" is taken when tools are given, else "default".
        variables: what templates see beside the conversation: bos_token and the like.
        seconds: wall clock for one rendering.

    A template is a program from the checkpoint: it runs in a sandbox with bounds on time and size. Special
    tokens in it must become special tokens, so the rendered text is tokenized with special tokens recognised
    everywhere, also in what users wrote; transformers and vLLM do the same.
    """

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, str], *, seconds: float = RENDER_SECONDS
    ) -> None:
        self._sources, self._variables, self._seconds = templates, dict(variables), seconds
        self._environment = TemplateEnvironment()
        self._compiled: dict[str, _Compiled] = {}

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: each with a role; content is a text or a list of {"type": "text", "text": ...} parts,
                which are joined by newlines unless the template reads parts itself. Keys that are None are
                left out, and a tool call's arguments are parsed from JSON, as templates expect.
            continue_final_message: end inside the last message, so that the model goes on with it.
            kwargs: further variables, for templates that have switches.

        Raises:
            RequestError: there is no template, it refuses the conversation, fails, or exceeds its bounds.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other",
                               param="continue_final_message", fix="set add_generation_prompt to false")
        if reserved := sorted(kwargs.keys() & (RESERVED | self._variables.keys())):
            raise RequestError(f"chat_template_kwargs cannot set {', '.join(reserved)}",
                               param="chat_template_kwargs")
        compiled = self._select("tool_use" if tools and "tool_use" in self._sources else "default")
        conversation = [_plain_message(i, given, compiled.wants_parts) for i, given in enumerate(messages)]
        if not conversation:
            raise RequestError("a conversation has at least one message", param="messages", found="[]")
        if continue_final_message:
            _mark_end(conversation[-1])
        text = self._run(compiled.template, {
            **kwargs, "messages": conversation, "tools": tools or None, "documents": None,
            "add_generation_prompt": add_generation_prompt,
        })
        return _cut_at_mark(text) if continue_final_message else text

    def _select(self, name: str) -> _Compiled:
        if name not in self._compiled:
            if name not in self._sources:
                raise RequestError(
                    "this model has no chat template" + (f" named {name!r}" if self._sources else ""),
                    code="chat_template_missing", known=self.names or None,
                    fix="use /v1/completions, or give a template with --chat-template FILE",
                )
            self._compiled[name] = self._compile(self._sources[name])
        return self._compiled[name]

    def _compile(self, source: str) -> _Compiled:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise _failure(TemplateLimitError(f"it has more than {MAX_TEMPLATE_CHARS} characters"))
        try:
            template = self._environment.from_string(source)
        except Exception as error:
            raise _failure(error) from error
        part = [{"type": "text", "text": PROBE}]
        return _Compiled(template, not self._shows(template, PROBE) and self._shows(template, part))

    def _shows(self, template: Template, content: object) -> bool:
        """Whether a user message with this content shows in the rendered text."""
        try:
            return PROBE in self._run(template, {"messages": [{"role": "user", "content": content}],
                                                 "add_generation_prompt": True})
        except RequestError:
            return False

    def _run(self, template: Template, variables: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        budget = Budget(seconds=self._seconds)
        try:
            for piece in template.generate({**self._variables, **variables, BUDGET: budget}):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARS:
                    raise TemplateLimitError(f"it writes more than {MAX_CHARS} characters")
        except Exception as error:  # a template is a program: it may raise anything
            raise _failure(error) from error
        return "".join(pieces)


def _failure(error: Exception) -> RequestError:
    line = error.lineno if isinstance(error, TemplateSyntaxError) else _template_line(error.__traceback__)
    where = f"line {line} of the template: " if line else ""
    return RequestError("the chat template does not take this conversation", param="messages",
                        code="chat_template_error", found=f"{where}{str(error) or type(error).__name__}")


def _template_line(traceback: TracebackType | None) -> int | None:
    """The innermost template line of a traceback; jinja2 puts its own line numbers in."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _plain_message(index: int, message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    """A message as templates expect it: a fresh dict, content in one of two shapes, tool arguments parsed."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role", param=where)
    plain = {key: value for key, value in message.items() if value is not None}
    if "content" in plain:
        plain["content"] = _content(where, plain["content"], wants_parts)
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(f"{where}.tool_calls", plain["tool_calls"])
    return plain


def _content(where: str, content: object, wants_parts: bool) -> str | list[dict[str, str]]:
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"{where}.content must be a text or a list of parts", param=f"{where}.content")
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise RequestError(f"{where}.content may hold text parts only", param=f"{where}.content",
                               found=part.get("type") if isinstance(part, Mapping) else type(part).__name__)
        texts.append(text)
    return [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts)


def _tool_calls(where: str, calls: object) -> list[Mapping[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RequestError(f"{where} must be a list of objects", param=where, found=repr(calls)[:80])
    return [_tool_call(where, call) for call in calls]


def _tool_call(where: str, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI clients send arguments as JSON text; templates read an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: arguments must be JSON", param=where, found=error) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(message: dict[str, Any]) -> None:
    """Put a mark behind a message's text; the space behind the mark tells whether the template trims."""
    content = message.get("content")
    if not content:
        raise RequestError("continue_final_message needs text in the last message",
                           param="continue_final_message")
    if isinstance(content, str):
        message["content"] = f"{content}{CUT} "
    else:
        message["content"] = [*content[:-1], {**content[-1], "text": f"{content[-1]['text']}{CUT} "}]


def _cut_at_mark(text: str) -> str:
    head, found, tail = text.rpartition(CUT)
    if not found:
        raise RequestError("the chat template leaves out the message to continue",
                           param="continue_final_message")
    return head if tail.startswith(" ") else head.rstrip()
