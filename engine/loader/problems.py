"""How the loader says no: every fault of a checkpoint in one CheckpointError, repeated ones on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...plugins.errors import CheckpointError

MAX_LINES = 20
MAX_NAME = 200
# At most nine digits at a time: int() refuses thousands of them, and a hostile name may have them.
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Problem:
    """One fault: where (file, tensor; None when it is not about one), what should be there and what is."""

    file: str | None
    tensor: str | None
    expected: str
    found: str


def show(name: str) -> str:
    """A name from an untrusted file, safe to print: no control characters, no surrogates, not endless."""
    shown = name if name.isprintable() and name else ascii(name)
    return shown if len(shown) <= MAX_NAME else f"{shown[:MAX_NAME]}... ({len(name)} characters)"


def template(name: str) -> str:
    """A name without its layer and expert numbers: `model.layers.3.mlp` -> `model.layers.*.mlp`."""
    return _NUMBER.sub("*", name)


def refuse(what: str, problems: Sequence[Problem], *, fix: str) -> CheckpointError:
    """The one error for all `problems`; lists the first 20 lines and counts the rest."""
    lines = collapse(problems)
    listed = [f"  - {line}" for line in lines[:MAX_LINES]]
    if len(lines) > MAX_LINES:
        listed.append(f"  - ... and {len(lines) - MAX_LINES} more lines like these")
    count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
    return CheckpointError("\n".join([f"{what}: {count}", *listed]), fix=fix)


def collapse(problems: Iterable[Problem]) -> list[str]:
    """One line for each set of problems that differ only in the numbers inside the tensor's name."""
    groups: dict[tuple[str | None, str, str], list[Problem]] = {}
    for problem in problems:
        kind = None if problem.tensor is None else template(problem.tensor)
        # Faults of whole files are few and each file matters, so they are never merged.
        key = (kind if kind is not None else problem.file, problem.expected, problem.found)
        groups.setdefault(key, []).append(problem)
    return [_line(group) for group in groups.values()]


def name_files(files: Iterable[str]) -> str:
    """`a.safetensors`, or `a.safetensors and 2 more files`."""
    unique = list(dict.fromkeys(files))
    more = len(unique) - 1
    return show(unique[0]) + (f" and {more} more file{'s' * (more != 1)}" if more else "")


def _line(group: list[Problem]) -> str:
    files = [p.file for p in group if p.file is not None]
    tensors = [p.tensor for p in group if p.tensor is not None]
    where = [name_files(files)] if files else []
    if tensors:
        where.append(_span(tensors))
    return f"{': '.join(where)}: expected {group[0].expected}, found {group[0].found}"


def _span(names: Sequence[str]) -> str:
    """Names of one template: `model.layers.0..31.mlp.weight (32 tensors)`."""
    if len(names) == 1:
        return show(names[0])
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names))
    ranges = iter([_range(sorted(set(column))) for column in columns])
    return f"{show(_NUMBER.sub(lambda _: next(ranges), names[0]))} ({len(names)} tensors)"


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}..{values[-1]}"
    return "{" + ",".join(map(str, values[:8])) + (",..." if len(values) > 8 else "") + "}"
