"""API keys: who is asking, in time that does not depend on the key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from .errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ping"})
"""Served without a key; everything else is refused, unknown paths and plugin routes included."""


class ApiKeys:
    """The accepted bearer tokens, kept only as SHA-256 digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def identify(self, authorization: str | None) -> str | None:
        """The id ("key0", "key1", ...) of the key in an Authorization header; None when no keys are set.

        Compares against every key, so that time tells nothing. Raises ApiError 401.
        """
        if not self._digests:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        offered = hashlib.sha256(token.strip().encode("latin-1")).digest()  # the header's bytes as they came
        matches = [secrets.compare_digest(offered, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "missing or wrong API key; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return f"key{matches.index(True)}"

    def cache_salt(self, key_id: str | None, asked: str | None) -> str | None:
        """The prefix-cache salt of a request: with several keys, no key can read or guess another's cache."""
        if len(self) < 2:
            return asked
        return f"{key_id}/{asked or ''}"
