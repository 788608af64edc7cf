"""The bytes of a stream, exactly; and what a stream says when it cannot go on."""

from __future__ import annotations

import json
import re

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
TEXT = {"prompt": "Hi", "stream": True}


def trace(response) -> str:
    """The raw body, with what changes from call to call replaced."""
    assert response.status_code == 200
    text = re.sub(r'"id":"(cmpl|chatcmpl)-[0-9a-f]{32}"', r'"id":"\1-ID"', response.text)
    return re.sub(r'"created":\d+', '"created":0', text)


def data(response) -> list:
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]


def chat_chunk(delta: str, finish: str, usage: str = "") -> str:
    return (
        'data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"fake",'
        f'"choices":[{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{finish},"stop_reason":null}}]'
        f"{usage}}}\n\n"
    )


def test_chat_bytes(serve):
    response = serve(text="Yo").post("/v1/chat/completions", **CHAT)
    assert trace(response) == (
        chat_chunk('"role":"assistant","content":"Y"', "null")
        + chat_chunk('"content":"o"', '"stop"')
        + "data: [DONE]\n\n"
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_chat_bytes_with_usage(serve):
    response = serve(text="Yo").post("/v1/chat/completions", **CHAT, stream_options={"include_usage": True})
    usage = (
        '"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":1}}'
    )
    assert trace(response) == (
        chat_chunk('"role":"assistant","content":"Y"', "null", ',"usage":null')
        + chat_chunk('"content":"o"', '"stop"', ',"usage":null')
        + 'data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"fake",'
        + '"choices":[],'
        + usage
        + "}\n\ndata: [DONE]\n\n"
    )


def test_completion_bytes(serve):
    response = serve(text="é\n").post("/v1/completions", **TEXT)
    head = (
        'data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"fake","choices":[{"index":0,'
    )
    assert trace(response) == (
        head
        + '"text":"é","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
        + head
        + '"text":"\\n","logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n'
        + "data: [DONE]\n\n"
    )


def test_continuous_usage_counts_up(serve):
    chunks = data(
        serve().post(
            "/v1/completions", **TEXT, stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
    )
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 5, 6, 6]
    assert chunks[-1]["choices"] == []


def test_every_choice_has_a_role_a_text_and_an_end(serve):
    chunks = data(serve().post("/v1/chat/completions", **CHAT, n=3))
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"]["content"] for c in mine) == "Hello!"
        assert ["role" in c["delta"] for c in mine] == [True] + [False] * 5
        assert [c["finish_reason"] for c in mine] == [None] * 5 + ["stop"]


def test_prompts_times_n_are_numbered(serve):
    chunks = data(serve(text="ab").post("/v1/completions", prompt=["x", "y"], n=2, stream=True, echo=True))
    texts: dict[int, str] = {}
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "xab", 1: "xab", 2: "yab", 3: "yab"}


@pytest.mark.parametrize("at", [{3: "dead"}, {3: "numerical"}, {3: "bug"}])
def test_a_failure_after_the_first_token_is_an_error_frame(serve, dead, at):
    faults = {
        "dead": (dead, "engine_dead"),
        "bug": (ValueError("secret prompt"), "internal_error"),
        "numerical": (None, "numerical_error"),
    }
    fault, code = faults[at[3]]
    live = serve(finish="error") if fault is None else serve(at={3: fault})
    response = live.post("/v1/chat/completions", **CHAT)
    *chunks, last = data(response)
    assert len(chunks) == (5 if fault is None else 3)
    assert last["error"]["code"] == code and set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text


def test_a_failure_before_the_first_token_has_a_status(serve, dead):
    response = serve(at={0: dead}).post("/v1/completions", **TEXT)
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"
    assert response.headers["retry-after"]


def test_abort_is_never_a_finish_reason(serve):
    *_, last = data(serve(finish="abort").post("/v1/completions", **TEXT))
    assert last["error"]["code"] == "request_aborted"


def test_comments_only_on_request(serve):
    quiet = serve(text="ab", delay=0.15).post("/v1/completions", **TEXT)
    assert ":" not in {line[:1] for line in quiet.text.split("\n")}
    kept = serve(text="ab", delay=0.15, args={"sse_keepalive": 0.05}).post("/v1/completions", **TEXT)
    assert ": keep-alive\n\n" in kept.text
    assert [c["choices"][0]["text"] for c in data_lines(kept)] == ["a", "b"]


def data_lines(response) -> list:
    return [json.loads(e[6:]) for e in response.text.split("\n\n") if e.startswith("data: {")]


def test_logprobs_of_a_stream_join_to_those_of_the_whole(serve):
    live = serve()
    body = {"prompt": "Hi", "logprobs": 2, "echo": True}
    whole = live.post("/v1/completions", **body).json()["choices"][0]["logprobs"]
    pieces = [c["choices"][0]["logprobs"] for c in data(live.post("/v1/completions", **body, stream=True))]
    assert whole == {key: [x for piece in pieces for x in piece[key]] for key in whole}
    assert whole["text_offset"] == list(range(8)) and whole["token_logprobs"][0] is None
