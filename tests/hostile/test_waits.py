"""Clients that do not read, do not send or are too many; an engine that stands still or dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time

import pytest

from rvllm.api.http.body import parse
from rvllm.api.http.errors import ApiError
from rvllm.api.schemas.requests import CompletionRequest
from support.clients.attacker import POST, Server, raw, rest, statuses


def begin(server: Server, **body: object) -> socket.socket:
    """Asks for a stream and reads nothing of it."""
    data = json.dumps({"prompt": "x", "stream": True, "ignore_eos": True, **body}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return sock


@pytest.mark.parametrize(
    "flags", [("--write-timeout", "1"), ("--max-unread-tokens", "64", "--write-timeout", "4")]
)
def test_who_does_not_read_gives_the_slots_back(flags: tuple[str, ...]) -> None:
    with Server("--max-queue", "2", *flags) as server:
        stalled = begin(server, max_tokens=2000, n=10, logprobs=20, return_token_ids=True)
        time.sleep(1)
        end = time.monotonic() + 60
        while server.complete()[0] != 200:
            assert time.monotonic() < end, "the slots of a client that does not read stay taken"
            time.sleep(0.5)
        metrics = server.get("/metrics")[1].decode()
        assert "vllm:num_requests_running" in metrics and server.rss() < 300
        stalled.close()


MANY = {
    "lists": (b'{"prompt":[' + b"[5]," * 1_000_000 + b"[5]]}", "100000 lists and objects"),
    "objects": (b'{"messages":[' + b'{"a":"b"},' * 300_000 + b"{}]}", "100000 lists and objects"),
    "keys": (b'{"logit_bias":{' + b'"1":1,' * 600_000 + b'"1":1}}', "200000 keys"),
    "values": (b'{"prompt":["",' + b"5," * 2_100_000 + b"5]}", "2000000 values"),
}


@pytest.mark.parametrize("name", MANY)
def test_a_body_of_many_parts_is_refused_before_it_is_parsed(name: str) -> None:
    """4 MB of lists took more than a second of the event loop; text may hold any of these marks."""
    body, message = MANY[name]
    with pytest.raises(ApiError, match=message) as caught:
        parse(body, CompletionRequest)
    assert caught.value.status == 400
    text = json.dumps({"prompt": body.decode() + '\\" \\\\'}).encode()
    assert parse(text, CompletionRequest).prompt == json.loads(text)["prompt"]


def test_connections_and_bodies_are_counted() -> None:
    flags = ("--max-connections", "24", "--max-connections-per-client", "16", "--header-timeout", "1.5",
             "--body-timeout", "1", "--max-inflight-mb", "0.2")  # fmt: skip
    with Server(*flags) as server, contextlib.ExitStack() as open_ones:
        for _ in range(16):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(0.2)
        refused = raw(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert statuses(refused) == [503] and b"--max-connections-per-client" in refused
        time.sleep(1.7)  # who says nothing is hung up on
        assert server.get("/health")[0] == 200
        open_ones.close()
        # A body that does not come in time; one that is too much beside it.
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        slow.sendall(POST + b"Content-Length: 190000\r\n\r\n" + b" " * 150_000)
        time.sleep(0.2)
        status, answer = server.ask("POST", "/v1/completions", {"prompt": "x" * 100_000})
        assert status == 503 and b"--max-inflight-mb" in answer
        assert statuses(rest(slow)) == [408]
        assert server.complete()[0] == 200


def health(server: Server) -> str:
    status, answer = server.get("/health")
    return str(json.loads(answer)["status"] if status == 200 else json.loads(answer)["error"]["code"])


def until(server: Server, wanted: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (found := health(server)) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_a_stopped_engine_is_told_of() -> None:
    """Nothing waits for it for ever, and it goes on where it was."""
    with Server("--engine-stall-seconds", "1.5") as server:
        os.kill(server.engine, signal.SIGSTOP)
        reader = begin(server, max_tokens=5)
        before = time.monotonic()
        assert health(server) == "ready"
        until(server, "stalled", 60)
        assert server.get("/metrics", 30)[0] == 200
        assert server.get("/rvllm/state", 30)[0] == 503
        assert time.monotonic() - before < 90
        os.kill(server.engine, signal.SIGCONT)
        until(server, "ready", 60)
        reader.settimeout(60)
        got = b""
        while b"[DONE]" not in got:
            got += reader.recv(65536)
        assert server.complete()[0] == 200


def test_a_stalled_or_dead_engine_is_replaced() -> None:
    flags = ("--engine-stall-seconds", "1", "--restart-engine", "--drain-timeout", "2")
    with Server(*flags) as server:
        first = server.engine
        os.kill(first, signal.SIGSTOP)
        reader = begin(server, max_tokens=500)
        until(server, "starting", 60)
        until(server, "ready", 90)
        assert server.engine != first and server.complete()[0] == 200
        assert server.complete(guided_choice=["yes", "no"])[0] == 200, "a new engine has the vocabulary"
        reader.settimeout(60)
        assert b"killed" in rest(reader), "what was running is told"
        os.kill(server.engine, signal.SIGKILL)
        until(server, "starting", 60)
        until(server, "ready", 90)
        assert server.complete()[0] == 200
        before = time.monotonic()
        assert server.end() == 0 and time.monotonic() - before < 25
