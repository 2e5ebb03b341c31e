"""Requests that two readers could read differently, and phases of the protocol that never end."""

from __future__ import annotations

import socket
import time

import pytest

from support.clients.attacker import POST, Server, raw, statuses

INNER = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSE = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BODY = b'{"prompt":"a","max_tokens":1,"temperature":0}'


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"foo", b"h2c, websocket", b"TLS/1.0"])
@pytest.mark.parametrize("target", [b"POST /v1/completions", b"GET /health"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_body_behind_an_upgrade_is_no_request(
    server: Server, protocol: bytes, target: bytes, apart: bool
) -> None:
    head = (target + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: Upgrade\r\nUpgrade: " + protocol
            + b"\r\nContent-Length: %d\r\n\r\n" % len(INNER))  # fmt: skip
    pieces = (head, INNER, CLOSE) if apart else (head + INNER + CLOSE,)
    answer = raw(server.port, *pieces, pause=0.1)
    assert b'"version"' not in answer
    assert statuses(answer) == [400 if target.startswith(b"POST") else 200, 200]


@pytest.mark.parametrize("chunked", [True, False])
def test_javas_client_is_answered(server: Server, chunked: bool) -> None:
    """Java's HttpClient asks for h2c with every plain request."""
    wishes = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) if chunked else BODY
    length = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % len(BODY)
    answer = raw(server.port, POST + wishes + length + body + CLOSE)
    assert statuses(answer) == [200, 200] and b"completion_tokens" in answer


REFUSED = {
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a sum as length": POST + b"Content-Length: +5\r\n\r\n",
    "hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\n",
    "length with a space": POST + b"Content-Length: 4 2\r\n\r\n",
    "length beyond 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "length with a comma": POST + b"Content-Length: 5, 5\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a folded header": POST + b"X-A: b\r\n Content-Length: 5\r\n\r\n",
    "a bare line feed": POST[:-2] + b"\nContent-Length: 5\r\n\r\n",
    "a bare carriage return": POST + b"X: a\rContent-Length: 5\r\n\r\n",
    "a null in a header": POST + b"X: a\0b\r\n\r\n",
    "chunked, twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two headers": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two hosts": POST + b"Host: other\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "no number of a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a negative chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": POST + b"Transfer-Encoding: chunked\r\n\r\n11111111111111111\r\n",
    "a chunk that is longer": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "TLS": b"\x16\x03\x01\x00\xc8\x01\x00" + b"a" * 200,
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "a version of its own": b"GET / HTTP/9.9\r\n\r\n",
    "no method": b"\x00\xff" * 50 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(server: Server, name: str) -> None:
    answer = raw(server.port, REFUSED[name] + INNER)
    assert statuses(answer) == [400] and b'"version"' not in answer


@pytest.mark.parametrize("packed", ["gzip", "deflate, gzip", "br", "x"])
def test_packed_bodies_are_not_unpacked(server: Server, packed: str) -> None:
    status, answer = server.ask("POST", "/v1/completions", b"\x1f\x8b" + b"a" * 100, Content_Encoding=packed)
    assert status == 415 and packed in answer.decode()


def test_connect_is_refused(server: Server) -> None:
    answer = raw(server.port, b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + INNER)
    assert statuses(answer) == [405]


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "trailers": (CHUNKED + b"0\r\n", b"X-Trailer: " + b"a" * 1000 + b"\r\n"),
    "one trailer": (CHUNKED + b"0\r\nX: ", b"a" * 1000),
    "a trailer without a key": (CHUNKED + b"0\r\n", b"a" * 1000),
    "a chunk's extension": (CHUNKED + b"1;", b"a=b;" * 250),
    "headers": (POST, b"X-A: " + b"a" * 1000 + b"\r\n"),
    "one header": (POST + b"X: ", b"a" * 1000),
    "a path": (b"GET /", b"a" * 1000),
    "empty lines in front": (b"", b"\r\n" * 500),
    "chunks of one byte with extensions": (CHUNKED, b"1;" + b"e" * 500 + b"\r\na\r\n"),
    "pipelined requests": (POST + b"Content-Length: 9\r\n\r\n", INNER * 20),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_no_phase_is_endless(server: Server, name: str) -> None:
    """Megabytes of it are cut off after some kilobytes, and are not kept."""
    begun, more = ENDLESS[name]
    before, rss = time.monotonic(), server.rss()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sent = 0
        try:
            sock.sendall(begun)
            while sent < 64 << 20 and time.monotonic() - before < 4:
                sent += sock.send(more * 16)
        except OSError:
            pass
    if name not in ("empty lines in front", "pipelined requests"):
        assert sent < 16 << 20
    assert server.rss() - rss < 60


def test_trailers_are_no_headers(server: Server) -> None:
    """A proxy has checked the headers; what comes behind the body must not change them."""
    chunk = b"%x\r\n%b\r\n" % (len(BODY), BODY)
    answer = raw(server.port, CHUNKED + chunk + b"0\r\nX-Request-Id: forged\r\n\r\n" + CLOSE)
    assert statuses(answer) == [200, 200] and b"forged" not in answer


def test_the_head_of_a_stream_of_events_ends(server: Server) -> None:
    ask = b"HEAD /rvllm/state HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    assert statuses(raw(server.port, ask + CLOSE, timeout=30)) == [200, 200]


def test_too_many_headers(server: Server) -> None:
    assert statuses(raw(server.port, POST + b"A: b\r\n" * 300 + b"\r\n")) == [431]


def test_a_body_that_dribbles_behind_its_answer_ends(server: Server) -> None:
    """Refused at once for its path; the client goes on sending one byte at a time."""
    before = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        try:
            while time.monotonic() - before < 60:
                sock.sendall(b"a")
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - before < 45
