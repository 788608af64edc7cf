"""The door of the attention family: paged cache write and attention over block tables."""

from .reference import attend, causal_mask, gather_kv, write_kv

__all__ = ["attend", "causal_mask", "gather_kv", "write_kv"]
