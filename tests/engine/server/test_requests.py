"""What a request becomes for the engine, and every way to be refused."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse

from nybble.engine.metrics import StepStats
from nybble.engine.request import RequestOutputKind
from nybble.plugins.errors import RequestError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and isinstance(body["message"], str)
    assert all(value is None or isinstance(value, str) for value in body.values())
    return body


LIMIT = "context_length_exceeded"
REFUSED = [
    (TEXT, {}, "prompt", None),
    (TEXT, {"prompt": ""}, "prompt", None),
    (TEXT, {"prompt": []}, "prompt", None),
    (TEXT, {"prompt": [[]]}, "prompt", None),
    (TEXT, {"prompt": [1, "a"]}, "prompt", None),
    (TEXT, {"prompt": [-1]}, "prompt[0]", None),
    (TEXT, {"prompt": [10**30]}, "prompt[0]", None),
    (TEXT, {"prompt": [300]}, "prompt", None),
    (TEXT, {"prompt": ["a"] * 1025}, "prompt", None),
    (TEXT, {"prompt": ["a"] * 1000, "n": 5}, "n", None),
    (TEXT, {"prompt": "a" * 65}, "prompt", LIMIT),
    (TEXT, {"prompt": "a" * 60, "max_tokens": 5}, "max_tokens", LIMIT),
    (TEXT, {"prompt": "a" * 2000}, "prompt", LIMIT),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", None),
    (TEXT, {"prompt": "a", "max_tokens": 10**30}, "max_tokens", None),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    (TEXT, {"prompt": "a", "best_of": 2}, "best_of", "unsupported_parameter"),
    (TEXT, {"prompt": "a", "n": 0}, "n", None),
    (TEXT, {"prompt": "a", "n": True}, "n", None),
    (TEXT, {"prompt": "a", "n": 129}, "n", None),
    (TEXT, {"prompt": "a", "temperature": -0.1}, "temperature", None),
    (TEXT, {"prompt": "a", "temperature": "1"}, "temperature", None),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p", None),
    (TEXT, {"prompt": "a", "seed": 10**30}, "seed", None),
    (TEXT, {"prompt": "a", "stop": ["x"] * 17}, "stop", None),
    (TEXT, {"prompt": "a", "stop": [1]}, "stop[0]", None),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias[5]", None),
    (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", None),
    (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", None),
    (TEXT, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", None),
    (CHAT, {}, "messages", None),
    (CHAT, {"messages": []}, "messages", None),
    (CHAT, {"messages": [3]}, "messages[0]", None),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0]", None),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages[0].content", None),
    *((CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": calls}]}, "messages[0].tool_calls",
       None) for calls in (5, [5], {}, "x")),
    (CHAT, {"messages": USER, "max_tokens": 100}, "max_tokens", LIMIT),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens", None),
    (CHAT, {"messages": USER, "max_completion_tokens": 100, "max_tokens": 1}, "max_completion_tokens", LIMIT),
    (CHAT, {"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens", None),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 64}]}, "messages", LIMIT),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", LIMIT),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", None),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"refuse": 1}}, "messages", "chat_template_error"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", None),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", None),
    (CHAT, {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
     "continue_final_message", None),
    *((CHAT, {"messages": USER, name: value}, name, "unsupported_parameter") for name, value in {
        "tools": [{"type": "function"}], "tool_choice": "required", "functions": [{}], "audio": {},
        "response_format": {"type": "json_object"}, "structured_outputs": {"json": {}},
        "chat_template": "{{ x }}", "modalities": ["text", "audio"],
    }.items()),
    ("/tokenize", {}, "prompt", None),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt", None),
    ("/detokenize", {}, None, None),
    ("/detokenize", {"tokens": [1, 256]}, "tokens[1]", None),
]


@pytest.mark.parametrize("path, body, param, code", REFUSED)
def test_refused_with_the_name_of_the_field(server, path, body, param, code):
    found = error(server.post(path, **body), 400)
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, code)


def test_context_error_has_both_numbers(server):
    message = error(server.post(TEXT, prompt="a" * 60, max_tokens=5), 400)["message"]
    assert "60" in message and "5" in message and "64" in message


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b'{"temperature": Infinity, "prompt": "a"}',
    b'{"prompt": "\xff"}', b'{"prompt": 1e999}', b'{"prompt": "a"} x', b'{"prompt": "\\ud800"}',
    b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf{}", b'{"n": ' + b"9" * 5000 + b"}",
])
def test_what_is_not_a_json_object_is_refused(server, content):
    assert error(server.http.post(TEXT, content=content), 400)["code"] == "invalid_json"


def test_statuses_of_the_routes(server):
    http = server.http
    assert error(server.post(TEXT, prompt="a", model="gpt-9"), 404)["code"] == "model_not_found"
    assert error(http.post("/v1/responses", json={}), 404)["type"] == "not_found_error"
    assert error(http.get("/health/"), 404)["code"] == "not_found"
    assert error(http.get(CHAT), 405)["code"] == "method_not_allowed"
    assert http.get(CHAT).headers["allow"] == "POST"
    assert error(http.post("/health"), 405)
    for path in ("/health", "/ping", "/version", "/load", "/metrics", "/v1/models"):
        assert http.get(path).status_code == 200
        head = http.head(path)
        assert head.status_code == 200 and head.content == b""
    assert http.get("/version").json()["version"] and http.get("/load").json() == {"server_load": 0}


def test_the_queue_being_full_is_429(serve):
    live = serve(at={0: RequestError("the queue is full", code="engine_overloaded")})
    response = live.post(TEXT, prompt="a")
    assert error(response, 429)["type"] == "rate_limit_error" and response.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, param, sent", [
    (CHAT, "logprobs", "top_logprobs"), (CHAT, "bad_words", "bad_words"), (TEXT, "logprobs", "logprobs"),
    (TEXT, "stop_token_ids", "stop_token_ids"),
])
def test_what_the_engine_refuses_has_the_name_that_the_client_sent(serve, path, param, sent, stream):
    live = serve(at={0: RequestError(f"{param} is at most 128 here", param=param, code="too_many")})
    body = {"messages": USER} if path == CHAT else {"prompt": ["a", "bc"]}
    found = error(live.post(path, **body, stream=stream), 400)
    assert (found["param"], found["code"]) == (sent, "too_many") and found["message"].startswith(sent)


def test_parameters_are_checked_once_for_prompts_of_one_length(server):
    server.post(TEXT, prompt=["a", "b", "c" * 50], stop=["x"])
    first, second, other = (seen["params"] for seen in server.engine.seen[-3:])
    assert first is second and (first.max_tokens, other.max_tokens) == (16, 14)


def test_an_engine_that_stands_still_is_503(serve):
    live, now = serve(), 1000.0
    stalled = "engine_stalled"
    live.app.state.api.heartbeat.clock = lambda: now

    def later(seconds: float, *, new: int = 0, gone: int = 0, **levels: int) -> str | None:
        """The code of /health, `seconds` after requests came or went or a step left these levels."""
        nonlocal now
        for _ in range(new):
            live.post(TEXT, prompt="a")
        live.engine.num_unfinished += new - gone
        for listener in live.engine.listeners if levels else ():
            listener(StepStats(**levels))
        now += seconds
        response = live.http.get("/health")
        return None if response.status_code == 200 else error(response, 503)["code"]

    assert later(99) is None  # idle
    assert later(9, new=1) is None and later(2, new=1) == stalled
    assert later(9, num_running=1, num_waiting=1) is None and later(2) == stalled
    assert later(99, num_running=0) is None  # a slow reader has not taken its last output
    assert later(11, new=1) == stalled
    assert later(99, gone=3) is None  # aborted: no step will come
    assert later(9, new=1) is None and later(2) == stalled


def test_a_dead_engine_is_503(serve, dead):
    live = serve(at={0: dead})
    assert error(live.post(TEXT, prompt="a"), 503)["code"] == "engine_dead"
    live.engine.errored = True
    response = live.http.get("/health")
    assert error(response, 503)["code"] == "engine_dead" and response.headers["retry-after"]


def test_numerical_and_unforeseen_errors_are_500(serve):
    assert error(serve(finish="error").post(CHAT, messages=USER), 500)["code"] == "numerical_error"
    found = error(serve(at={1: KeyError("secret")}).post(CHAT, messages=USER), 500)
    assert (found["code"], found["type"]) == ("internal_error", "server_error")
    assert "secret" not in found["message"]


def test_what_the_engine_is_asked(server):
    server.post(TEXT, prompt="ab", n=2, stop=["x"], stop_token_ids=[3], logit_bias={"7": -1.5}, seed=9,
                top_k=5, min_tokens=2, min_p=0.5, ignore_eos=False, echo=None, prompt_logprobs=1, priority=-4,
                cache_salt="s")
    seen = server.engine.seen[-1]
    params = seen["params"]
    assert (seen["prompt"], seen["priority"], seen["salt"]) == ([97, 98], -4, "s")
    assert (params.n, params.stop, params.stop_token_ids, params.logit_bias) == (2, ["x"], [3], {7: -1.5})
    assert (params.seed, params.min_tokens, params.top_k, params.min_p) == (9, 2, 5, 0.5)
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (16, None, 1)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    server.post(TEXT, prompt="a" * 60, truncate_prompt_tokens=-1)
    assert len(server.engine.seen[-1]["prompt"]) == 60
    server.post(TEXT, prompt="b" * 70 + "c", truncate_prompt_tokens=-1)
    assert server.engine.seen[-1]["prompt"][-1] == 99 and server.engine.seen[-1]["params"].max_tokens == 1


def test_checkpoint_defaults_hold_unless_the_client_says_otherwise(serve):
    live = serve(defaults={"temperature": 0.3, "top_p": 0.8, "max_tokens": 4})
    live.post(CHAT, messages=USER, top_p=0.9)
    params = live.engine.seen[-1]["params"]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.9, 4)
    live.post(CHAT, messages=USER, max_completion_tokens=9, stream=True)
    assert live.engine.seen[-1]["params"].max_tokens == 9
    assert live.engine.seen[-1]["params"].output_kind is RequestOutputKind.DELTA


def test_chat_fills_the_context_by_default(server):
    server.post(CHAT, messages=USER)
    assert server.engine.seen[-1]["params"].max_tokens == 64 - len("u:Hi|a:")


def test_messages_as_parts_and_continuation(server):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    server.post(CHAT, messages=[{"role": "user", "content": parts}])
    assert bytes(server.engine.seen[-1]["prompt"]) == b"u:H\ni|a:"
    server.post(CHAT, messages=[*USER, {"role": "assistant", "content": "So"}], continue_final_message=True)
    assert bytes(server.engine.seen[-1]["prompt"]) == b"u:Hi|a:So"
    server.post(CHAT, messages=USER, add_generation_prompt=False)
    assert bytes(server.engine.seen[-1]["prompt"]) == b"u:Hi|"


def test_unknown_fields_are_named(server):
    unknown = {"user": "u", "store": True, "x\r\ny": 1, "é": 2}
    response = server.post(CHAT, messages=USER, tools=[], top_a=None, **unknown)
    assert response.status_code == 200 and response.headers["x-nybble-ignored"] == "user, store, ?, ?"
    assert "x-nybble-ignored" not in server.post(CHAT, messages=USER).headers


def test_any_content_type_and_duplicate_keys_are_read(server):
    body = b'{"prompt": "x", "max_tokens": 9, "max_tokens": 2}'
    response = server.http.post(TEXT, content=body, headers={"content-type": "text/plain"})
    assert response.json()["choices"][0]["text"] == "He"


@pytest.mark.parametrize("sent, kept", [("abc-1.Z_", True), ("a" * 129, False), ("a b", False), ("", False)])
def test_request_ids(server, sent, kept):
    response = server.http.post(TEXT, json={"prompt": "a"}, headers={"x-request-id": sent})
    given = response.headers["x-request-id"]
    assert (given == sent) is kept and response.json()["id"] == f"cmpl-{given}"
    assert server.post(TEXT, prompt="a", request_id="mine").json()["id"] == "cmpl-mine"
    engine_ids = [seen["id"] for seen in server.engine.seen]
    assert len(set(engine_ids)) == len(engine_ids)


def test_token_ids_and_prompt_logprobs_come_back_on_request(server):
    choice = server.post(TEXT, prompt="ab", return_token_ids=True, prompt_logprobs=0).json()["choices"][0]
    assert choice["token_ids"] == [ord(c) for c in "Hello!"] and choice["prompt_token_ids"] == [97, 98]
    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"}}]
    chat = server.post(CHAT, messages=USER, return_token_ids=True, prompt_logprobs=0).json()
    assert bytes(chat["prompt_token_ids"]) == b"u:Hi|a:" and len(chat["prompt_logprobs"]) == 7


def test_tokenize_and_back(server):
    found = server.post("/tokenize", prompt="Hi", model="fake", add_special_tokens=False).json()
    assert found == {"count": 2, "max_model_len": 64, "tokens": [72, 105], "token_strs": None}
    found = server.post("/tokenize", messages=USER, return_token_strs=True).json()
    assert "".join(found["token_strs"]) == "u:Hi|a:"
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "u:Hi|a:"}


def test_without_a_tokenizer_token_ids_still_work(serve):
    live = serve(tokenizer=None)
    assert live.post(TEXT, prompt=[1, 2]).json()["choices"][0]["text"] == "Hello!"
    for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": USER}), ("/tokenize", {"prompt": "a"})):
        assert error(live.post(path, **body), 400)["code"] == "no_tokenizer"


def test_plugin_routes_are_served_behind_the_same_door(serve):
    class Host:
        def add_routes(self, app):
            app.add_route("/hello", lambda request: PlainTextResponse("hi"), methods=["GET"])
            app.add_route("/health", lambda request: PlainTextResponse("mine"), methods=["GET"])

    live = serve(host=Host(), args={"api_keys": ("k",)})
    assert live.http.get("/hello").status_code == 401
    assert live.http.get("/hello", headers={"authorization": "Bearer k"}).text == "hi"
    assert live.http.get("/health").text == ""
