"""NormalFloat 4-bit weights for nybble. Imported at every start, so it imports no torch."""

from __future__ import annotations

from typing import Any

from nybble import hookimpl

NYBBLE_API = (1, 0)


@hookimpl
def nybble_quants() -> dict[str, str]:
    return {"nf4": "nybble_nf4.method:NF4Config"}


@hookimpl
def nybble_cli(commands: Any) -> None:
    commands.add("quantize-nf4", "write a Llama folder again with NF4 weights", "nybble_nf4.convert:main")
