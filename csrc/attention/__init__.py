"""The door of the attention family: paged cache write and attention over block tables, of K and V or of latents."""

from .mla_reference import (
    absorb,
    absorbing_is_cheaper,
    attend_expanded,
    attend_rows,
    gather_rows,
    project_values,
    write_rows,
)
from .reference import attend, causal_mask, gather_kv, write_kv

__all__ = [
    "absorb",
    "absorbing_is_cheaper",
    "attend",
    "attend_expanded",
    "attend_rows",
    "causal_mask",
    "gather_kv",
    "gather_rows",
    "project_values",
    "write_kv",
    "write_rows",
]
