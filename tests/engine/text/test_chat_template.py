"""Conversations through templates, and templates that mean harm."""

from __future__ import annotations

import datetime
import time
import tracemalloc

import pytest

from nybble.engine.text.chat_template import ChatRenderer
from nybble.engine.text.template_sandbox import FILTERS, TemplateEnvironment
from nybble.plugins.errors import RequestError

USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
PARTS = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"


def render(template: str, messages=(USER,), *, seconds: float = 2.0, **options) -> str:
    renderer = ChatRenderer({"default": template}, {"bos_token": "<s>"}, seconds=seconds)
    return renderer.render(list(messages), **options)


@pytest.mark.parametrize(("template", "content", "expected"), [
    (PLAIN, "a", "[user]a>"),
    (PLAIN, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "[user]a\nb>"),
    (PLAIN, [], "[user]>"),
    (PARTS, "a", "<a>"),
    (PARTS, [{"type": "text", "text": "a"}, "b"], "<a><b>"),
])
def test_content_comes_as_the_template_reads_it(template: str, content: object, expected: str) -> None:
    assert render(template, [{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize(("template", "content", "expected"), [
    (PLAIN, "so ", "[user]hi[assistant]so "),
    (PLAIN.replace("m.content", "m.content|trim"), "so ", "[user]hi[assistant]so"),
    (PARTS, [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}], "<hi><a><b "),
])
def test_continue_final_message_ends_inside_it(template: str, content: object, expected: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    assert render(template, messages, add_generation_prompt=False, continue_final_message=True) == expected
    assert messages[1]["content"] == content, "the caller's messages are not touched"


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ bos_token }}{{ pad_token }}{{ x }}{{ tools is none }}", "<s>1True"),
    ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ("{{ {'b': '<é>', 'a': 1}|tojson(indent=1) }}", '{\n "b": "<é>",\n "a": 1\n}'),
    ("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% generation %}{{ messages|length }}{% endgeneration %}", "1"),
    ("{{ (messages + [1])|length }}{{ messages[::-1][0]['role'] }}{{ 7 % 2 }}{{ 'a' ~ 1 }}", "2user1a1"),
    ("{{ 'a-b'.split('-')|join('+') }}{{ 'x'.join(['1', '2']) }}{{ 'ab'.replace('b', 'c') }}", "a+b1x2ac"),
    ("{% macro m(x) %}<{{ x }}>{% endmacro %}{% set n = namespace(a=m(1)) %}{{ n.a|indent }}", "<1>"),
    ("{% filter upper %}a{{ 1 }}{% endfilter %}{% set b | upper %}c{% endset %}{{ b }}", "A1C"),
    ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}", "['hi']"),
])
def test_templates_see_what_transformers_shows_them(template: str, expected: str) -> None:
    assert render(template, x=1) == expected


def test_filters_give_what_jinja_gives_them() -> None:
    """Those that are replaced to be paid for do the same."""
    from jinja2 import Environment

    samples = ["'a\n\nb'|indent", "'a\nb'|indent(3, true)", "'aaa'|replace('a', 'b', 2)",
               "'abc'|replace('', '-')", "[1, 'x', none]|join(', ')", "messages|join('|', attribute='role')",
               "[1, 2.5]|sum", "2.567|round(1)",
               "messages|sum(attribute='n', start=2)", "2.1|round(method='ceil')|int", "[3, 1, 2]|sort|list",
               "'a b'|title", "{'a': 1}|dictsort", "[1, 1, 2]|unique|list", "(1, 2)|first", "none|string"]
    messages = [{"role": "user", "content": "x", "n": 3}]
    for sample in samples:
        source = "{{ " + sample + " }}"
        assert render(source, messages) == Environment().from_string(source).render(messages=messages), sample
    assert set(TemplateEnvironment().filters) - FILTERS == {" each", " paid"}


def test_tool_arguments_are_parsed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    template = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ 'content' in messages[0] }}"
    assert render(template, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == "1False"
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(("messages", "options", "param", "message"), [
    ([], {}, "messages", "at least one"),
    (["hi"], {}, "messages[0]", "object with a role"),
    ([USER, {"content": "x"}], {}, "messages[1]", "object with a role"),
    ([{"role": "user", "content": 5}], {}, "messages[0].content", "a text or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages[0].content", "image_url"),
    *(([{"role": "a", "tool_calls": calls}], {}, "messages[0].tool_calls", "must be a list of objects")
      for calls in (5, [5], {}, [{}, "x"])),
    ([{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}], {}, "messages[0].tool_calls",
     "must be JSON"),
    ([USER], {"continue_final_message": True}, "continue_final_message", "exclude each other"),
    ([{"role": "user"}], {"continue_final_message": True, "add_generation_prompt": False},
     "continue_final_message", "needs text"),
    ([USER], {"bos_token": "x"}, "chat_template_kwargs", "cannot set bos_token"),
    ([USER], {"documents": [], "tokenize": True}, "chat_template_kwargs", "cannot set documents, tokenize"),
])
def test_refused_conversations(messages, options, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        render(PLAIN, messages, **options)
    assert refusal.value.param == param


def test_a_template_that_drops_the_message_cannot_continue_it() -> None:
    with pytest.raises(RequestError, match="leaves out"):
        render("x", add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(("template", "found"), [
    ("a\n{% for %}", "line 2 of the template: Expected an expression"),
    ("a\nb\n{{ raise_exception('roles must alternate') }}", "line 3 of the template: roles must alternate"),
    ("\n{{ messages[0].content.x.y }}", "line 2 of the template: 'str object' has no attribute 'x'"),
    ("{{ 1 / 0 }}", "line 1 of the template: division by zero"),
    ("\n{{ 'a'|nothing }}", "line 2 of the template: No filter named 'nothing'"),
    ("{% include 'x' %}", "no loader"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    ("x" * (1 << 20) + "x", "more than 1048576 characters"),
])
def test_a_broken_template_is_the_requests_error(template: str, found: str) -> None:
    with pytest.raises(RequestError) as refusal:
        render(template)
    assert refusal.value.code == "chat_template_error" and refusal.value.param == "messages"
    assert found in str(refusal.value)


DOUBLE = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"
LONG = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops over one list": "{% set r = range(9999)|list %}{% for a in r %}{% for b in r %}"
                                  "{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "recursive macro":
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lists of lists": DOUBLE.replace("START", "[1]").replace("STEP", "[n.x, n.x]"),
    "dicts of dicts": DOUBLE.replace("START", "1").replace("STEP", "dict(a=n.x, b=n.x)"),
    "compare lists": DOUBLE.replace("n.x = STEP", "n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y]").replace(
        "x=START", "x=[1], y=[1]").replace("{{ n.x }}", "{{ n.x == n.y }}"),
    "arguments of arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
                              "{{ varargs == kwargs }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
}
LARGE = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat a constant": "{{ 1000000000 * 'a' }}",
    "repeat a list": "{{ [1] * 10**9 }}",
    "repeated lists of lists": DOUBLE.replace("START", "[1]").replace("STEP", "[n.x] * 1000"),
    "add": DOUBLE.replace("START", "'ab'").replace("STEP", "n.x + n.x"),
    "add lists": DOUBLE.replace("START", "[1]").replace("STEP", "n.x + n.x"),
    "concatenate": DOUBLE.replace("START", "'ab'").replace("STEP", "n.x ~ n.x"),
    "concatenate many": "{% set x = 'a' * 4000000 %}{{ " + "~".join("x" * 500) + " }}",
    "block": DOUBLE.replace("START", "'ab'").replace(
        "{% set n.x = STEP %}", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "split block": "{% set y %}{% for i in range(6000) %}{{ 'abc' * 1300 }}{% endfor %}{% endset %}"
                   "{{ y.split('c')|length }}",
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE.replace("START", "'ab'").replace("STEP", "f(n.x)"),
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}",
    "replace nothing": "{{ ('a' * 1000000)|replace('', 'b' * 1000) }}",
    "join": "{{ ('b' * 100000).join(range(9999)|map('string')) }}",
    "join defaults": "{{ range(9999)|map(attribute='no', default='b' * 100000)|join }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "fromkeys": "{{ dict.fromkeys(range(9999), 'b' * 100000)|tojson }}",
    "json": "{{ (['x' * 1000000] * 1000)|tojson }}",
}
FORBIDDEN = {
    "{{ raise_exception(['x' * 1000000] * 9) }}": "more text", "{{ [1]|tojson(indent=10**9) }}": "no width",
    "{{ 5|round(-10**9) }}": "no width", "{{ strftime_now('%c' * 1000000) }}": "no width",
    "{{ ([[0]] * 100)|sum(start=[]) }}": "numbers only", "{{ range(10**9)|list }}": "MAX_RANGE",
    "{{ 2 ** 1000000000 }}": "4096 bits", DOUBLE.replace("START", "9**99").replace("STEP", "n.x * n.x"): "4096 bits",
    "{{ 'a'.ljust(10**9) }}": "unsafe", "{{ 'a'|center(10**9) }}": "No filter", "{{ 'a'|wordwrap(1) }}": "No filter",
    "{{ '{:1000000000}'.format(1) }}": "unsafe", "{{ '{0.__class__}'.format_map({}) }}": "unsafe",
    "{{ 'a'.encode() * 10**9 }}": "unsafe", "{{ (1).to_bytes(10**9, 'big') }}": "unsafe",
    "{{ '%1000000000d' % 1 }}": "join texts with ~", "{{ lipsum(9999) }}": "undefined",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe", "{{ raise_exception.__globals__.x }}": "unsafe",
    "{{ messages|map(attribute='__class__.__init__')|list|first|length }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}": "recursion",
}


@pytest.mark.parametrize("name", LONG)
def test_a_template_that_would_not_end_is_ended(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"runs longer than|more text"):
        render(LONG[name], seconds=0.2)
    assert time.monotonic() - started < 3, "three renderings: two that probe the template, one of the conversation"


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_would_fill_memory_is_stopped_before(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"more text than a prompt can hold|writes more"):
            render(LARGE[name], seconds=30)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("template", FORBIDDEN)
def test_what_templates_may_not_do(template: str) -> None:
    with pytest.raises(RequestError, match=FORBIDDEN[template]) as refusal:
        render(template)
    assert refusal.value.code == "chat_template_error" and len(str(refusal.value)) < 5000


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 1000}] * 400
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    assert len(render(template, messages)) == 400 * (5000 + len("<user><end>"))
