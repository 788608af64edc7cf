"""Every route is closed without a key, except the two that say whether the server lives."""

from __future__ import annotations

import pytest

from nybble.engine.server.auth import OPEN_PATHS, ApiKeys
from nybble.engine.server.errors import ApiError

KEYS = ("first-key", "schlüssel")


@pytest.fixture(scope="module")
def locked(serve_module):
    return serve_module(args={"api_keys": KEYS})


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer first-keY",
    "Bearer first-key2",
    "Basic first-key",
    "first-key",
    "Bearer first-key schlüssel",
    "Bearer \xff",
    "Bearer schlussel",
]


def test_every_route_is_closed(locked):
    routes = {(m, r.path) for r in locked.app.routes for m in r.methods} | {
        ("GET", "/nowhere"),
        ("POST", "/metrics"),
    }
    assert len(routes) == 25
    for method, path in sorted(routes):
        path = path.replace("{model:path}", "fake")
        for header in WRONG:
            headers = {} if header is None else {"authorization": header.encode()}
            response = locked.http.request(method, path, headers=headers)
            if path in OPEN_PATHS:
                assert response.status_code == 200, (method, path)
                continue
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                found = response.json()["error"]
                assert (found["type"], found["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("header", [f"Bearer {KEYS[0]}", f"bearer {KEYS[0]}", f"BEARER   {KEYS[0]}"])
def test_any_spelling_of_the_scheme_opens(locked, header):
    for path in ("/metrics", "/v1/models", "/load", "/version"):
        assert locked.http.get(path, headers={"authorization": header}).status_code == 200
    assert locked.http.get("/nowhere", headers={"authorization": header}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/Health", "//health", "/health/", "/health/../metrics", "/ping;x", "/%2568ealth"]
)
def test_nothing_that_looks_like_an_open_path_is_open(locked, path):
    assert locked.http.get(path).status_code == 401


def test_cache_salts_keep_keys_apart(locked):
    def salt(key: str, **body: str) -> str:
        headers = {"authorization": f"Bearer {key}".encode()}
        assert (
            locked.http.post("/v1/completions", json={"prompt": "a", **body}, headers=headers).status_code
            == 200
        )
        return locked.engine.seen[-1]["salt"]

    mine, same, salted, theirs = (
        salt(KEYS[0]),
        salt(KEYS[0]),
        salt(KEYS[0], cache_salt="key1/"),
        salt(KEYS[1]),
    )
    assert mine == same and len({mine, salted, theirs}) == 3


def test_identify():
    assert ApiKeys(()).identify(None) is None
    assert ApiKeys(KEYS).identify(f"Bearer {KEYS[1]}".encode().decode("latin-1")) == "key1"
    assert ApiKeys(("k", "k")).identify("Bearer k") == "key0"
    assert ApiKeys(("k",)).cache_salt("key0", "mine") == "mine"
    with pytest.raises(ApiError):
        ApiKeys(("",)).identify(None)
