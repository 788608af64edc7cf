"""Names for the contents of full KV-cache blocks: a SHA-256 chain over token ids."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

BlockHash = bytes
"""Digest of a block's tokens and of everything before them: equal hashes mean equal prefixes."""

ROOT: BlockHash = bytes(32)


def hash_block(parent: BlockHash, tokens: Sequence[int], extra: bytes = b"") -> BlockHash:
    """SHA-256 of parent digest (32 bytes), tokens (little-endian uint32) and extra keys.

    A hash with findable collisions would let a client make a prompt that reads another's KV (CVE-2025-25183).
    The first two fields have a fixed length in one cache, so different inputs never make one message.
    """
    return hashlib.sha256(parent + struct.pack(f"<{len(tokens)}I", *tokens) + extra).digest()


def extend_block_hashes(
    hashes: list[BlockHash], tokens: Sequence[int], block_size: int, cache_salt: str | None = None
) -> None:
    """Append to `hashes` those of the full blocks of `tokens` that it lacks; a partial block has none.

    `cache_salt` goes into the first block and so, down the chain, into all: other salts share nothing.
    """
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else ROOT
        extra = b"" if start or cache_salt is None else b"salt" + cache_salt.encode("utf-8", "surrogatepass")
        hashes.append(hash_block(parent, tokens[start : start + block_size], extra))
