"""What comes before a body is bounded, lists are bounded before anything walks over them, and every refusal
is an error object."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from support.doubles.server import LiveServer

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HELLO = [{"role": "user", "content": "hi"}]


def exchange(server: LiveServer, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends the pieces on a connection of their own and returns all that comes until it is closed."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(60)
        answer = b""
        try:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
            while chunk := sock.recv(65536):
                answer += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"content-type: application/json" in head
    return int(head.split()[1]), error["message"]


@pytest.mark.parametrize(
    "bytes_of",
    [
        b"\x16\x03\x01\x00\xc8\x01\x00" + b"a" * 200,
        b"\x00\xff" * 50 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n{}",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_an_error_object(server: LiveServer, bytes_of: bytes) -> None:
    assert error_of(exchange(server, bytes_of))[0] == 400


def test_endless_headers_are_cut_off(server: LiveServer) -> None:
    begun = b"GET /version HTTP/1.1\r\nHost: x\r\n"
    status, message = error_of(exchange(server, begun, *[b"X-A: " + b"a" * 20_000 + b"\r\n"] * 4, pause=0.05))
    assert status == 431 and "65536" in message
    before = time.process_time()  # as the server's is too, whatever else the machine does
    exchange(server, begun, *(b"X-%d: " % i + b"b" * 10_000 + b"\r\n" for i in range(5000)))
    assert time.process_time() - before < 5
    assert server.raw("GET", "/version")[0] == 200


def test_headers_of_a_usual_size_pass_after_a_large_body(server: LiveServer) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 1, "user": "u" * 500_000}).encode()
    first = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    second = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-A: " + b"a" * 30_000 + b"\r\n\r\n"
    answer = exchange(server, first + second)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_slow_headers_time_out() -> None:
    with LiveServer(drain_timeout=0.2, header_timeout=0.3) as server:
        drip = [b"GET /version HTTP/1.1\r\n", b"X-A: b\r\n", b"X-"]
        assert error_of(exchange(server, *drip, pause=0.05))[0] == 408
        assert exchange(server) == b"", "who says nothing is hung up on without a word"
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            for _ in range(3):  # a connection that is kept alive may rest between requests
                sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.5)
                assert b"200 OK" in sock.recv(65536)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [1] * 2_000_000}, "prompt"),
        ("/v1/completions", {"prompt": [""] * 1_000_000}, "prompt"),
        ("/v1/chat/completions", {"messages": HELLO * 90_000}, "messages"),
        ("/v1/chat/completions", {"messages": HELLO, "stop_token_ids": [1] * 1_900_000}, "stop_token_ids"),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "x"}] * 50_000}, "tools"),
        ("/v1/responses", {"input": HELLO * 90_000}, "input"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f"}] * 50_000}, "tools"),
        ("/v1/conversations", {"items": HELLO * 90_000}, "items"),
        ("/v1/messages", {"max_tokens": 2, "messages": HELLO * 90_000}, None),
        ("/v1/messages/count_tokens", {"messages": HELLO, "tools": [{"name": "f"}] * 50_000}, None),
    ],
)
def test_long_lists_are_refused_at_sight(server: LiveServer, path: str, body: Any, param: str | None) -> None:
    data = json.dumps({"model": "tiny", **body}).encode()
    before = time.process_time()
    status, _, answer = server.raw("POST", path, data)
    assert status == 400, answer[:300]
    assert time.process_time() - before < 3
    if param is not None:
        assert json.loads(answer)["error"]["param"] == param


def test_a_forms_part_has_a_bounded_head(server: LiveServer) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="' + b"a" * 5_000_000 + b'"\r\n\r\nz\r\n--x--'
    before = time.process_time()
    status, _, answer = server.raw(
        "POST", "/v1/files", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert status == 400 and b"header" in answer.lower()
    assert time.process_time() - before < 3
