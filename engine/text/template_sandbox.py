"""Jinja in a sandbox that templates can neither leave nor outrun: each loop, call and text is paid for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join, do_round, do_sum
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

MAX_CHARS = 1 << 22
MAX_UNITS = 1 << 26
ELEMENT_UNITS = 16
MAX_INT_BITS = 4096
MAX_WIDTH = 16
MAX_ERROR_CHARS = 2000
CONTAINERS = (list, tuple, dict)

# No template can write these names: a Jinja identifier has no space.
BUDGET, EACH, PAID = " budget", " each", " paid"

# What chat templates use. The rest takes quadratic time, or makes text of a size that a number says, as do
# the methods below.
FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum",
    "title", "tojson", "trim", "unique", "upper",
})
UNSAFE_STR_METHODS = frozenset({
    "center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill",
})


class TemplateLimitError(TemplateError):
    """A template made too much or ran too long."""


class Budget:
    """What one rendering may still do. A unit is a character; an element of a container is ELEMENT_UNITS.

    Args:
        seconds: of wall clock until the rendering is stopped.
        units: of text and elements that may be made in all, kept or not.
    """

    def __init__(self, *, seconds: float, units: int = MAX_UNITS) -> None:
        self._left, self._seconds = units, seconds
        self._deadline = time.monotonic() + seconds

    def spend(self, units: int) -> None:
        """Raises TemplateLimitError when nothing is left."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError("it makes more text than a prompt can hold")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it runs longer than {self._seconds:g} s")

    def make(self, units: int, times: int = 1) -> None:
        """Pay for one text or container before it is made. Raises TemplateLimitError also for its size."""
        if units * times > MAX_CHARS:
            raise TemplateLimitError("it makes more text than a prompt can hold")
        self.spend(units * times)

    def charge(self, value: object) -> int:
        """Pay for a value with all that is in it; returns its units.

        Paying goes along with walking: lists that hold one list twice, many times over, have no end in sight.
        """
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            units = shallow_units(item)
            self.make(units)
            total += units
            if isinstance(item, CONTAINERS):
                parts = item.values() if isinstance(item, dict) else item
                stack.extend(part for part in parts if isinstance(part, (str, *CONTAINERS)))
        return total

    def text(self, value: object) -> str:
        """`str(value)`, paid for."""
        self.charge(value)
        return str(value)

    def metered(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, each paid for when it is taken."""
        for item in items:
            self.spend(ELEMENT_UNITS)
            yield item


def shallow_units(value: object) -> int:
    """Units of a text or a container without what is inside; 0 for anything else."""
    if isinstance(value, str):
        return len(value)
    return ELEMENT_UNITS * len(value) if isinstance(value, CONTAINERS) else 0


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    return _budget(context).metered(items)


@pass_context
def _paid(context: Context, value: Any) -> Any:
    if isinstance(value, Iterator):
        return _budget(context).metered(value)
    _budget(context).charge(value)
    return value


@pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = _budget(context)
    text, old, new = budget.text(text), budget.text(old), budget.text(new)
    limit = -1 if count is None else count
    found = text.count(old)
    budget.make(len(new), found if limit < 0 else min(found, limit))
    return text.replace(old, new, limit)


@pass_context
def _join(context: Context, items: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    parts, budget = list(items), _budget(context)
    separator = budget.text(d)
    budget.make(budget.charge(parts))
    budget.make(len(separator), len(parts))
    return do_join(context.eval_ctx, parts, separator, attribute)


@pass_context
def _join_method(context: Context, separator: str, items: Iterable[Any]) -> str:
    return _join(context, items, separator)


@pass_context
def _indent(
    context: Context, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    budget = _budget(context)
    text = budget.text(text)
    budget.make(len(width) if isinstance(width, str) else max(0, width), text.count("\n") + 1)
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it for chat templates: JSON as it is, not escaped for HTML."""
    for item in (indent or 0, *(separators or ())):
        _check_width("tojson", len(item) if isinstance(item, str) else item)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    _check_width("round", precision)
    return do_round(value, precision, method)


@pass_context
def _sum(context: Context, items: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise SecurityError("sum adds numbers only")
    return do_sum(context.environment, items, attribute, start)


@pass_context
def _raise_exception(context: Context, message: Any = "") -> None:
    raise TemplateError(_budget(context).text(message)[:MAX_ERROR_CHARS])


def _strftime_now(layout: str) -> str:
    _check_width("strftime_now", len(layout) // 16)
    return datetime.now().strftime(layout)


def _check_width(name: str, width: int) -> None:
    if abs(width) > MAX_WIDTH:
        raise TemplateLimitError(f"{name} takes no width of {width}")


def _check_int(operator: str, left: int, right: int) -> None:
    """Raises TemplateLimitError before a number gets so long that arithmetic on it takes seconds."""
    bits = left.bit_length()
    result = bits * max(0, right) if operator == "**" else bits + right.bit_length()
    if result > MAX_INT_BITS:
        raise TemplateLimitError(f"it computes a number of more than {MAX_INT_BITS} bits")


GROWING_METHODS: Mapping[str, Callable[..., str]] = {"replace": _replace, "join": _join_method}


class _Meter(NodeTransformer):
    """Puts a till wherever a template makes, shows or repeats something."""

    @staticmethod
    def _filter(name: str, value: nodes.Node | None, near: nodes.Node) -> nodes.Filter:
        return nodes.Filter(value, name, [], [], None, None, lineno=near.lineno, environment=near.environment)

    def visit_Result(self, node: nodes.Node) -> nodes.Node:
        return self._filter(PAID, self.generic_visit(node), node)

    visit_List = visit_Dict = visit_Filter = visit_Result

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_Result(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Output(self, node: nodes.Output | nodes.Concat) -> nodes.Node:
        """Parts are paid before they are put together: a thousand of them could be too many at once."""
        self.generic_visit(node)
        node.nodes = [self._filter(PAID, part, part) for part in node.nodes]
        return node

    visit_Concat = visit_Output

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = self._filter(PAID, node.filter, node)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filter(EACH, node.iter, node)
        return node


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model said, for training; here it stands for its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The one environment that chat templates are compiled in; what they see is what transformers gives them.

    Render with `{BUDGET: Budget(...)}` among the variables.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        del self.globals["lipsum"]
        self.filters = {name: f for name, f in self.filters.items() if name in FILTERS} | {
            EACH: _each, PAID: _paid, "replace": _replace, "join": _join, "indent": _indent,
            "tojson": _tojson, "round": _round, "sum": _sum,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Meter().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """None leaves `format` to `is_safe_attribute`, which refuses it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (int, float)) or (isinstance(obj, str) and attr in UNSAFE_STR_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.charge((args, kwargs))
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and obj.__name__ in GROWING_METHODS:
            return GROWING_METHODS[obj.__name__](context, owner, *args, **kwargs)
        result = super().call(context, obj, *args, **kwargs)
        budget.charge(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if isinstance(left, int) and isinstance(right, int):
            _check_int(operator, left, right)
        elif operator == "+":
            budget.make(shallow_units(left) + shallow_units(right))
            budget.charge(left)
            budget.charge(right)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    budget.make(budget.charge(value), max(0, times))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("text formatting with % is not available; join texts with ~")
        return super().call_binop(context, operator, left, right)
