"""A client that leaves takes its requests with it, whatever they were."""

from __future__ import annotations

import json
import socket
import time

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
CASES = [
    ("/v1/chat/completions", CHAT, 1),
    ("/v1/chat/completions", {**CHAT, "n": 3}, 1),
    ("/v1/completions", {"prompt": "a"}, 1),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, 3),
]


def request(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


@pytest.fixture(scope="module")
def slow(serve_module):
    return serve_module(text="abcdefgh", delay=0.5)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path, body, requests", CASES)
def test_leaving_aborts(slow, path, body, requests, stream):
    seen, aborted = len(slow.engine.seen), len(slow.engine.aborted)
    with socket.create_connection(slow.address) as sock:
        sock.sendall(request(path, {**body, "stream": stream}))
        slow.until(lambda: len(slow.engine.seen) == seen + requests)
        if stream:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.05)
    slow.until(lambda: len(slow.engine.aborted) == aborted + requests)
    assert {s["id"] for s in slow.engine.seen[seen:]} == set(slow.engine.aborted[aborted:])
    slow.until(lambda: slow.http.get("/load").json() == {"server_load": 0})


def test_leaving_is_counted(slow):
    text = slow.http.get("/metrics").text
    assert 'nybble:request_success_total{finished_reason="abort",model_name="fake"}' in text


def test_leaving_before_the_body_is_complete_is_nothing(slow):
    seen = len(slow.engine.seen)
    with socket.create_connection(slow.address) as sock:
        sock.sendall(request("/v1/completions", {"prompt": "a"})[:-3])
    assert slow.http.get("/health").status_code == 200 and len(slow.engine.seen) == seen


def test_a_bad_prompt_among_good_ones_aborts_those(slow):
    aborted = len(slow.engine.aborted)
    response = slow.post("/v1/completions", prompt=[[1], [2], [255 + 1]])
    assert response.status_code == 400
    slow.until(lambda: len(slow.engine.aborted) == aborted + 2)
