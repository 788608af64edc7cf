"""The door of the attention family: paged cache write and attention over block tables, of K and V or of latents."""

from .cache import HeadNorms, rope_and_cache, rope_and_cache_reference, store_kv
from .latent_cache import latent_and_cache, latent_and_cache_reference, rotate_latent
from .mla_reference import (
    absorb,
    absorbing_is_cheaper,
    attend_expanded,
    attend_rows,
    gather_rows,
    project_values,
    write_rows,
)
from .paged import AttentionTile, Ragged, attend_latent, attend_paged, attend_plain, rope_and_attend
from .prompt import prompt_attention_missing
from .reference import attend, causal_mask, gather_kv, write_kv

__all__ = [
    "AttentionTile",
    "HeadNorms",
    "Ragged",
    "absorb",
    "absorbing_is_cheaper",
    "attend",
    "attend_expanded",
    "attend_latent",
    "attend_paged",
    "attend_plain",
    "attend_rows",
    "causal_mask",
    "gather_kv",
    "gather_rows",
    "latent_and_cache",
    "latent_and_cache_reference",
    "project_values",
    "prompt_attention_missing",
    "rope_and_attend",
    "rope_and_cache",
    "rope_and_cache_reference",
    "rotate_latent",
    "store_kv",
    "write_kv",
    "write_rows",
]
