"""Whatever JSON comes, the answer is 200, 400 or 404, errors are error objects, and the server serves on."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from nybble.engine.server.protocol import ChatRequest, CompletionRequest

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, "a" * 100, "\u0000", "fake"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
PLAUSIBLE = {
    "model": st.sampled_from(["fake", "other", None]),
    "prompt": st.text(max_size=5)
    | st.lists(st.integers(0, 300), max_size=4)
    | st.lists(st.text(max_size=3), max_size=4),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON}),
        max_size=3,
    ),
    "n": st.integers(-1, 4),
    "max_tokens": st.integers(-1, 70),
    "logprobs": st.integers(-1, 5) | st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-2, 300).map(str), st.floats(-200, 200), max_size=3),
    "stream_options": st.fixed_dictionaries({"include_usage": JSON}),
}
PATHS = {"/v1/completions": (CompletionRequest, "prompt"), "/v1/chat/completions": (ChatRequest, "messages")}


def bodies(kind: type) -> st.SearchStrategy[dict]:
    fields = {name: PLAUSIBLE.get(name, SCALARS) | JSON for name in kind.__struct_fields__}
    return st.fixed_dictionaries({}, optional=fields)


def check(response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    events = [response.text]
    if "event-stream" in response.headers["content-type"]:
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "") and all(e.startswith("data: {") for e in events)
        events = [e[6:] for e in events]
    for body in map(json.loads, events):
        if "error" in body:
            assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
            assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["type"], str)
            assert all(
                body["error"][k] is None or isinstance(body["error"][k], str) for k in ("param", "code")
            )
        else:
            assert body["object"].startswith(("text_completion", "chat.completion"))
    assert ("error" in json.loads(events[-1])) == (response.status_code != 200)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_fields(server, path, data):
    kind, wanted = PATHS[path]
    body = data.draw(bodies(kind))
    if data.draw(st.booleans()):
        body[wanted] = data.draw(PLAUSIBLE[wanted])
    check(server.http.post(path, content=json.dumps(body)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from([*PATHS]),
)
def test_any_bytes(server, body, path):
    check(server.http.post(path, content=body))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(0, 60), flip=st.integers(0, 59), byte=st.integers(0, 255))
def test_damaged_bodies(server, cut, flip, byte):
    body = bytearray(b'{"prompt": "Hi", "max_tokens": 3, "n": 2, "stop": ["q", "z"]}')
    body[flip] = byte
    check(server.http.post("/v1/completions", content=bytes(body[:cut] if cut < 30 else body)))
    assert server.post("/v1/completions", prompt="Hi", max_tokens=3).json()["choices"][0]["text"] == "Hel"
