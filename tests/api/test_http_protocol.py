"""What holds for all endpoints: routes, errors, limits, keys, clients that go away, death and shutdown."""

import concurrent.futures
import http.client
import json
import socket
import threading
import time

import pytest

from support.doubles.server import LiveServer
from support.waiting import until

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}).encode()


def send(server: LiveServer, body: bytes, path: str = CHAT) -> socket.socket:
    """Sends a request and leaves the connection open."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_kept_connection_takes_one_large_body_after_another(server: LiveServer, chunked: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for padding in (200_000, 0, 300_000, 100_000, 10):
        body = BODY + b" " * padding
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))
        connection.putheader(*framing)
        connection.endheaders()  # a head alone, as most clients send it
        time.sleep(0.02)
        for at in range(0, len(body), 50_000):
            part = body[at : at + 50_000]
            connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            time.sleep(0.005)
        if chunked:
            connection.send(b"0\r\n\r\n")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["object"]) == (200, "chat.completion")


def test_models_version_health(server: LiveServer) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/version", "/health"):
        assert server.raw("GET", path)[0] == 200, path
    card = json.loads(server.raw("GET", "/v1/models")[2])["data"][0]
    assert (card["id"], card["max_model_len"], card["context_length"]) == ("tiny", 256, 256)
    able = {name for name, can in card["capabilities"].items() if can}
    assert able == {"chat", "completions", "responses", "messages", "tools", "structured_outputs", "logprobs"}
    assert {"embeddings", "fim", "reasoning", "vision"} <= card["capabilities"].keys()
    assert server.raw("GET", "/v1/models/other")[0] == 404


def test_tokenize_and_back(server: LiveServer) -> None:
    _, answer = server.post("/tokenize", prompt="hello 日本", return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert server.post("/detokenize", tokens=answer["tokens"])[1] == {"prompt": "hello 日本"}
    _, chat = server.post("/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert server.tokenizer.decode(chat["tokens"]).endswith("<|im_start|>assistant\n")
    assert server.post("/tokenize")[0] == 400
    assert server.post("/detokenize", tokens=[10**9])[1]["error"]["param"] == "tokens"


def test_what_is_only_tokenised_has_a_limit(server: LiveServer) -> None:
    long = "hello " * 200_000
    for path, body, param in (
        ("/tokenize", {"prompt": long}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": long}]}, None),
        ("/detokenize", {"tokens": [1] * 1_000_001}, "tokens"),
    ):
        status, answer = server.post(path, model="tiny", **body)
        assert status == 413, answer
        if param is not None:
            assert answer["error"]["param"] == param


def test_long_texts_leave_the_event_loop_free(server: LiveServer) -> None:
    busy = threading.Thread(
        target=server.post,
        args=("/tokenize",),
        kwargs={"prompt": "hello 日本 " * 80_000, "return_token_strs": True},
    )
    busy.start()
    slowest = 0.0
    while busy.is_alive():
        began = time.monotonic()
        assert server.raw("GET", "/version")[0] == 200
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1.0


def test_metrics_have_vllms_names_and_count(server: LiveServer) -> None:
    server.chat(max_tokens=5)
    page = server.raw("GET", "/metrics")[2].decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
                 "generation_tokens_total", "prefix_cache_hits_total", "prefix_cache_queries_total",
                 "num_preemptions_total", "time_to_first_token_seconds_bucket", "request_success_total",
                 "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_count"):  # fmt: skip
        assert f'vllm:{name}{{engine="0"' in page, name
    assert 'rvllm:http_responses_total{path="/v1/chat/completions",status="200"}' in page


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405)],
)
def test_routes_that_are_not(server: LiveServer, method: str, path: str, status: int) -> None:
    code, _, body = server.raw(method, path)
    assert code == status
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a\\udc00b"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}]} trailing',
    ],
    ids=lambda body: repr(body[:50]),
)
def test_bodies_that_are_no_request_are_a_400(server: LiveServer, body: bytes) -> None:
    status, _, answer = server.raw("POST", CHAT, body)
    assert status == 400, answer
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_only_json_is_read(server: LiveServer) -> None:
    status, _, _ = server.raw("POST", CHAT, BODY, {"Content-Type": "text/plain"})
    assert status == 415
    assert server.raw("POST", CHAT, BODY, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_an_unknown_model_is_a_404(server: LiveServer) -> None:
    status, answer = server.chat(model="gpt-5")
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (404, "model", "model_not_found")


def test_the_request_id_is_the_clients_own_unless_it_is_no_id(server: LiveServer) -> None:
    assert server.raw("GET", "/version", headers={"X-Request-Id": "abc-1"})[1]["x-request-id"] == "abc-1"
    assert server.raw("GET", "/version", headers={"X-Request-Id": "x" * 500})[1]["x-request-id"] != "x" * 500
    assert server.raw("GET", "/version")[1]["x-request-id"]


def test_a_client_that_goes_away_ends_its_request(server: LiveServer) -> None:
    engine = server.engine
    engine.pace = 0.01
    for stream in (False, True):
        body = json.dumps(
            {"messages": [{"role": "user", "content": "hello"}], "n": 2, "stream": stream}
        ).encode()
        aborted = len(engine.aborted)
        sock = send(server, body)
        until(lambda: len(engine.open) == 2)
        sock.close()
        until(lambda: not engine.open, 0.5)
        assert len(engine.aborted) == aborted + 2


def test_a_client_that_never_finishes_its_body_holds_nothing_up(server: LiveServer) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert server.chat(max_tokens=1)[0] == 200
    sock.close()


def test_limits_of_body_queue_and_key() -> None:
    with LiveServer(max_body_mb=0.001, max_queue=1, api_key="s3cret", drain_timeout=0.2) as server:
        key = {"Authorization": "Bearer s3cret"}
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic s3cret"}):
            status, headers, body = server.raw("POST", CHAT, BODY, wrong)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert server.raw("GET", "/health")[0] == 200
        assert server.raw("POST", CHAT, BODY, key)[0] == 200

        large = BODY[:-1] + b" " * 1000 + b"}"
        assert server.raw("POST", CHAT, large, key)[0] == 413
        huge = (
            b" " * 30_000_000
        )  # more than the sockets' buffers hold, from a client that sends before it reads
        assert server.raw("POST", CHAT, huge, key)[0] == 413
        chunked = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        chunked += "Authorization: Bearer s3cret\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(chunked.encode() + b"7d0\r\n" + b" " * 2000 + b"\r\n")
            assert b" 413 " in sock.recv(100)

        server.engine.held = True  # 4 sequences run at once, 1 more may wait
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            waiting = [pool.submit(server.raw, "POST", CHAT, BODY, key) for _ in range(5)]
            until(lambda: len(server.engine.open) == 5)
            status, headers, body = server.raw("POST", CHAT, BODY, key)
            assert (status, headers["retry-after"]) == (429, "1")
            assert "--max-queue" in json.loads(body)["error"]["message"]
            server.engine.held = False
            assert [future.result()[0] for future in waiting] == [200] * 5
        assert server.raw("POST", CHAT, BODY, key)[0] == 200


def test_a_request_that_takes_too_long_is_cancelled() -> None:
    with LiveServer(request_timeout=0.1, drain_timeout=0.2) as server:
        server.engine.pace = 0.02
        status, answer = server.chat()
        assert (status, answer["error"]["type"]) == (408, "timeout_error")
        assert not server.engine.open
        with send(server, BODY[:-1] + b', "stream": true, "ignore_eos": true, "max_tokens": 99}') as sock:
            data = b""
            while b"[DONE]" not in data:
                data += sock.recv(65536)
        assert b"--request-timeout" in data


def test_the_engines_death_reaches_every_client_and_health() -> None:
    with LiveServer(dead_engine_timeout=1.0) as server:
        server.engine.pace = 0.02
        stream = send(server, BODY[:-1].replace(b"3", b"90") + b', "stream": true}')
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            whole = pool.submit(server.chat)
            until(lambda: len(server.engine.open) == 2)
            time.sleep(0.1)
            server.call(server.engine.die, "the engine process was killed by signal 9")
            status, answer = whole.result(60)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "signal 9" in answer["error"]["message"]
        data = b""
        while b"[DONE]" not in data:
            data += stream.recv(65536)
        assert b"signal 9" in data
        assert server.raw("GET", "/health")[0] == 503
        assert server.raw("GET", "/metrics")[0] == 200
        assert server.chat()[0] == 500
        assert server.ended(60) == 1


def test_a_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    with LiveServer() as server:
        server.engine.pace = 0.02
        sock = send(server, BODY.replace(b"3", b"20"))
        until(lambda: len(server.engine.open) == 1)
        server.call(server.stop.first.set)
        until(lambda: refused(server))
        assert b'"finish_reason":"length"' in read_to_end(sock)
        assert server.ended(60) == 0


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_a_drain_can_be_cut_short(how: str) -> None:
    with LiveServer(drain_timeout=0.2 if how == "timeout" else 60.0) as server:
        server.engine.held = True
        sock = send(server, BODY)
        until(lambda: len(server.engine.open) == 1)
        server.call(server.stop.first.set)
        if how == "second signal":
            server.call(server.stop.second.set)
        answer = read_to_end(sock)
        assert b" 503 " in answer
        assert b"shutting down" in answer
        assert server.ended(60) == (0 if how == "timeout" else 143)
        assert not server.engine.open


def refused(server: LiveServer) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_without_a_tokenizer_token_ids_are_taken_and_given() -> None:
    with LiveServer(texts=False, drain_timeout=0.2) as server:
        _, answer = server.post(
            "/v1/completions", prompt=[1, 2], max_tokens=3, return_token_ids=True, logprobs=0
        )
        choice = answer["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", server.engine.answer[:3])
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in server.engine.answer[:3]]
        events = server.events("/v1/completions", prompt=[1, 2], max_tokens=3, return_token_ids=True)
        assert [e["choices"][0]["token_ids"] for e in events] == [[i] for i in server.engine.answer[:3]]
        for path, body in (("/v1/completions", {"prompt": "text"}), ("/tokenize", {"prompt": "text"})):
            status, answer = server.post(path, **body)
            assert (status, answer["error"]["param"]) == (400, "prompt")
        assert server.chat()[0] == 400
        assert server.post("/v1/completions", prompt=[1], stop="x")[0] == 400


def test_a_client_that_reads_slowly_holds_only_itself_up(server: LiveServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True, "logprobs": True,
                       "top_logprobs": 20, "n": 16}).encode()  # fmt: skip
    slow = send(server, body)
    until(lambda: len(server.engine.open) > 0)
    for _ in range(5):
        assert server.chat(max_tokens=2)[0] == 200
    data = b""
    while b"[DONE]" not in data[-100:]:
        data += slow.recv(1 << 20)
    assert data.count(b'"finish_reason":"length"') == 16
    slow.close()


def test_the_engines_death_cuts_a_drain_short_and_is_a_failure() -> None:
    with LiveServer(drain_timeout=60.0) as server:
        server.engine.held = True
        sock = send(server, BODY)
        until(lambda: len(server.engine.open) == 1)
        server.call(server.stop.first.set)
        until(lambda: refused(server))
        server.call(server.engine.die, "out of memory")
        assert b"out of memory" in read_to_end(sock)
        assert server.ended(60) == 1


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_a_hopeless_prompt_costs_no_tokenising(
    server: LiveServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.tokenizer, "encode", encode)
    text = "hello world " * 100_000
    chat = path == CHAT
    given = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    status, answer = server.post(path, **given)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == ("messages" if chat else "prompt")
