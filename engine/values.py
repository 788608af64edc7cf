"""Setting values: one parser by field type for flags, environment, YAML and Python, and their merge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from fractions import Fraction
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ..plugins.errors import UsageError

T = TypeVar("T")

NUMBER = re.compile(r"([+-]?)(\d{1,30})(\.\d{1,30})?([kKmMgGtT]?)", re.ASCII)
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Entry(NamedTuple):
    """One value somebody gave: as it came, the name it came under, and where from."""

    raw: Any
    spelled: str
    origin: str


def merge(cls: type[T], given: Mapping[str, Entry]) -> tuple[T, dict[str, str]]:
    """A settings object of parsed and checked values, and the origin of each field ("default" if not given).

    Fields without `setting()` metadata keep their default. Raises UsageError under the spelling of the entry.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if not field.metadata:
            continue
        entry = given.get(field.name)
        origins[field.name] = entry.origin if entry else "default"
        if entry:
            values[field.name] = parse_value(field, hints[field.name], entry.raw, entry.spelled)
    return cls(**values), origins


def parse_value(field: Field[Any], hint: Any, raw: Any, spelled: str) -> Any:
    """`raw` as a value of the field's type, inside its choices and bounds.

    Text is parsed; a value that already has the type is taken. "none", "" and None clear an optional setting.
    """
    base, optional = base_type(hint)
    if optional and (raw is None or (isinstance(raw, str) and raw.strip().lower() in ("", "none"))):
        return None
    try:
        value = PARSERS[base](raw)
    except (ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{spelled} must be {WANTED[base]}", found=repr(raw)) from error
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{spelled} has no value {value!r}", known=choices)
    if limits := _broken_bounds(field.metadata, value):
        raise UsageError(f"{spelled} must be {limits}", found=repr(raw))
    return value


def base_type(hint: Any) -> tuple[type, bool]:
    """(plain type, whether None is allowed) of an annotation: `list[str] | None` -> (list, True)."""
    members = get_args(hint)
    optional = NoneType in members
    inner = next(m for m in members if m is not NoneType) if optional else hint
    return get_origin(inner) or inner, optional


def _broken_bounds(meta: Mapping[str, Any], value: Any) -> str | None:
    """The bounds as words when the value is outside them."""
    low, high, above = meta["low"], meta["high"], meta["above"]
    inside = (
        (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    )
    if inside:
        return None
    words = [f"at least {low}"] if low is not None else []
    words += [f"above {above}"] if above is not None else []
    words += [f"at most {high}"] if high is not None else []
    return " and ".join(words)


def _bool(raw: Any) -> bool:
    text = raw.strip().lower() if isinstance(raw, str) else raw
    if isinstance(text, bool):
        return text
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ValueError(raw)


def _int(raw: Any) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    match = NUMBER.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if not match:
        raise ValueError(raw)
    sign, whole, decimals, suffix = match.groups()
    # exact arithmetic: as a float, 25.6k would be a hair off 25600
    number = Fraction(whole + (decimals or "")) * SUFFIXES.get(suffix, 1)
    if (decimals and not suffix) or number.denominator != 1:
        raise ValueError(raw)
    return -int(number) if sign == "-" else int(number)


def _float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError(raw)
    number = float(raw)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(raw)
    return number


def _str(raw: Any) -> str:
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise ValueError(raw)
    return raw


def _list(raw: Any) -> list[str]:
    """A comma separated text, or a list of such texts (a repeated flag, a YAML list)."""
    texts = [raw] if isinstance(raw, str) else raw
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise ValueError(raw)
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _dict(raw: Any) -> dict[str, Any]:
    value = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(raw)
    return value


PARSERS: dict[type, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    list: _list,
    dict: _dict,
}
WANTED: dict[type, str] = {
    bool: "true or false",
    int: "a whole number (4096, 4k = 4000, 4K = 4096, 25.6k)",
    float: "a number",
    str: "text (quote it if YAML reads it as something else)",
    list: "names separated by commas",
    dict: "a JSON object",
}
