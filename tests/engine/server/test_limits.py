"""Bounds on what a client may send and how slowly, on raw sockets."""

from __future__ import annotations

import json
import socket
import time

import pytest

SMALL = {"body_bytes": 1000, "body_seconds": 0.3, "head_seconds": 0.3, "stalled_seconds": 0.3}
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def tight(serve_module):
    return serve_module(limits=SMALL)


def talk(live, *pieces: bytes) -> bytes:
    """Send pieces, then read until an error object is complete or the server closes or falls silent."""
    with socket.create_connection(live.address, timeout=3) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
        except OSError:
            pass  # the server may answer and close before all is sent
        answer = b""
        try:
            while not answer.endswith(b'"}}') and (chunk := sock.recv(65536)):
                answer += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def error(answer: bytes, status: int) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"connection: close" in head.lower()
    return json.loads(body)["error"]


def test_a_length_over_the_cap_is_refused_before_a_byte_is_read(tight):
    began = time.monotonic()
    answer = talk(tight, POST + b"content-length: 1001\r\nexpect: 100-continue\r\n\r\n")
    found = error(answer, 413)
    assert (found["type"], found["code"]) == ("invalid_request_error", "request_too_large")
    assert b"100 Continue" not in answer and time.monotonic() - began < 2.9


def test_a_chunked_body_is_cut_off_at_the_cap(tight):
    chunk = b"200\r\n" + b"x" * 512 + b"\r\n"
    assert error(talk(tight, POST + b"transfer-encoding: chunked\r\n\r\n", chunk, chunk), 413)


def test_a_client_in_the_middle_of_a_large_body_still_gets_the_answer(tight):
    response = tight.http.post("/v1/completions", content=b"x" * 2_000_000)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_the_cap_itself_is_allowed(tight):
    body = json.dumps({"prompt": "a", "pad": ""})
    body = body[:-2] + "x" * (1000 - len(body)) + body[-2:]
    assert tight.http.post("/v1/completions", content=body).status_code == 200


def test_a_body_that_does_not_come_is_408(tight):
    assert error(talk(tight, POST + b"content-length: 10\r\n\r\n{"), 408)["code"] == "request_timeout"


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", POST])
def test_a_head_that_does_not_come_is_cut_off(tight, sent):
    began = time.monotonic()
    assert talk(tight, sent) == b"" and time.monotonic() - began < 2


def test_a_head_that_does_not_come_on_a_used_connection_is_cut_off(tight):
    with socket.create_connection(tight.address, timeout=3) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        sock.sendall(POST)
        began = time.monotonic()
        assert sock.recv(1000) == b""
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "bomb",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-bomb: " + b"a" * 1_000_000,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
        b"GET /" + b"a" * 200_000,
    ],
)
def test_header_bombs_are_refused(tight, bomb):
    answer = talk(tight, bomb + b"\r\n\r\n")
    assert answer == b"" or error(answer, 400)["code"] == "invalid_http"
    assert tight.http.get("/health").status_code == 200


@pytest.mark.parametrize("size, status", [(60_000, 200), (66_000, 400)])
def test_the_bound_on_heads_holds_for_one_that_comes_whole(tight, size, status):
    """In one write, which a Unix socket or a fast loopback delivers as one read; and many small headers as one."""
    for filler in (b"x: " + b"a" * size, b"\r\n".join([b"x: " + b"a" * 15] * (size // 20))):
        answer = talk(tight, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + filler + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("target, status", [
    (b"http://x/health", 200), (b"HTTPS://me@x:80/health?a=http://y", 200), (b"http://x", 404), (b"http://x?a", 404),
    (b"/http://x/health", 404),
])  # fmt: skip
def test_absolute_targets_mean_their_path(tight, target, status):
    answer = talk(tight, b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)


UNREAD = [(b"GET /health", 200), (b"GET /nowhere", 404), (b"POST /health", 405), (b"POST /metrics", 405)]


@pytest.mark.parametrize("start, status", UNREAD)
def test_an_unread_body_may_neither_trickle_nor_flood(tight, monkeypatch, start, status):
    monkeypatch.setattr("nybble.engine.server.connection.LINGER_SECONDS", 0.3)
    head = start + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for chunk, pause, most in ((b"1\r\nx\r\n", 0.05, 0.35), (b"400\r\n" + b"x" * 1024 + b"\r\n", 0.02, 0.2)):
        with socket.create_connection(tight.address, timeout=3) as sock:
            sock.sendall(head)
            assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status)
            began = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < began + 2:
                    sock.sendall(chunk)
                    time.sleep(pause)
            assert time.monotonic() - began < most + 0.3


def test_an_unread_body_that_ends_in_time_keeps_the_connection(serve, monkeypatch):
    monkeypatch.setattr("nybble.engine.server.connection.LINGER_SECONDS", 0.2)
    with socket.create_connection(serve().address, timeout=3) as sock:
        for late in (b"ab", b"c"):
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(late))
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
            sock.sendall(late)
            time.sleep(0.3)
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        sock.sendall(b"x" + POST + b"content-length: 15\r\n\r\n{")  # the next request is no unread body
        time.sleep(0.3)
        sock.sendall(b'"prompt": "a"}')
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_error_object(tight, junk):
    assert error(talk(tight, junk), 400)["code"] == "invalid_http"


def test_a_broken_chunk_behind_an_answer_ends_the_connection(tight, caplog):
    answer = talk(tight, b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", b"", b"ZZ\r\n")
    assert answer.count(b"HTTP/1.1") == 1 and "data_received" not in caplog.text


def test_a_broken_chunk_is_refused(tight):
    answer = talk(tight, POST + b"transfer-encoding: chunked\r\n\r\nZZ\r\n")
    assert error(answer, 400)["code"] == "invalid_http"


def test_pipelined_requests_are_answered_in_order(tight):
    one = POST + b'content-length: 15\r\n\r\n{"prompt": "a"}'
    answer = talk(tight, one + one + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 3 and answer.endswith(b'"}')


def test_a_reader_that_stalls_is_dropped_and_aborted(serve):
    live = serve(text="x" * 2000, limits={"stalled_seconds": 0.3}, delay=0.0)
    with socket.create_connection(live.address, timeout=5) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"prompt": ["a", "b"], "stream": true, "max_tokens": 60, "n": 100, "logprobs": 20}'
        sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        live.until(lambda: len(live.engine.aborted) == 2)
        live.until(lambda: live.http.get("/load").json() == {"server_load": 0})
        ours = sock.getsockname()[:2]
        assert ours not in {connection.client for connection in live.web.server_state.connections}
