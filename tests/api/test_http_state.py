"""`/rvllm/state` and the page's files over real HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import time

import pytest

from rvllm.api.page import strategy_of
from support.doubles.server import CONTEXT, LiveServer


def test_the_page_and_its_files(server: LiveServer) -> None:
    status, headers, body = server.raw("GET", "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in headers["content-security-policy"]
    names = [word.split('"')[0] for word in body.decode().split('"/web/')[1:]]
    assert {name.rpartition(".")[2] for name in names} >= {"css", "js"}
    for name in names:
        status, headers, body = server.raw("GET", f"/web/{name}")
        assert status == 200 and body, name
        assert server.raw("GET", f"/web/{name}", headers={"If-None-Match": headers["etag"]})[0] == 304
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Ffiles.py", "__init__.py", ""])
def test_other_names_are_not_found(server: LiveServer, name: str) -> None:
    assert server.raw("GET", f"/web/{name}")[0] == 404


def test_state_once(server: LiveServer) -> None:
    status, headers, body = server.raw("GET", "/rvllm/state")
    assert status == 200 and headers["cache-control"] == "no-store"
    state = json.loads(body)
    assert state["model"] == "tiny" and state["backend"] == "double" and state["num_blocks"] == 10
    assert state["stats"]["steps"] == 7 and state["cached_blocks"] == [7, 8]
    first = {"op": "qkv", "kernel": "gemm_bf16", "count": 30, "why": "the only one", "strategy": "native"}
    assert state["kernels"][0] == first


@pytest.mark.parametrize("interval", ["0.1", "61", "nan", "often", "1e9"])
def test_interval_is_checked(server: LiveServer, interval: str) -> None:
    status, _, body = server.raw("GET", f"/rvllm/state?interval={interval}")
    assert status == 400 and "interval must be 0.2 to 60 seconds" in json.loads(body)["error"]["message"]


def watch(live: LiveServer, interval: float = 0.2) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=80)
    connection.request("GET", f"/rvllm/state?interval={interval}", headers={"Accept": "text/event-stream"})
    return connection.getresponse()


def next_event(response: http.client.HTTPResponse) -> dict[str, object] | None:
    while line := response.readline():
        if line.startswith(b"data: "):
            return None if b"[DONE]" in line else json.loads(line[6:])
    raise AssertionError("the stream ended without a word")


def test_a_stream_follows_the_engine_and_costs_nothing_when_nobody_watches() -> None:
    with LiveServer() as live:
        live.engine.held = True
        response = watch(live)
        first = next_event(response)
        assert first is not None and first["sequences"] == [] and first["floor_seconds"] is None
        thread = threading.Thread(target=live.chat, kwargs={"max_tokens": 2})
        thread.start()
        while (seen := next_event(response)) is not None and not seen["sequences"]:
            pass
        assert seen is not None and seen["sequences"][0]["blocks"] == [0, 1]  # type: ignore[index]
        assert seen["sequences"][0]["id"].startswith("chatcmpl-")  # type: ignore[index]
        live.engine.held = False
        thread.join()
        response.close()
        asked, until = -1, time.monotonic() + 30  # the server notices within an interval
        while asked != live.engine.asked_for_state:
            assert time.monotonic() < until
            asked = live.engine.asked_for_state
            time.sleep(0.6)


def test_many_watchers_ask_the_engine_once() -> None:
    with LiveServer() as live:
        began = time.monotonic()
        responses = [watch(live, 0.4) for _ in range(8)]
        for _ in range(3):
            for response in responses:
                assert next_event(response) is not None
        for response in responses:
            response.close()
        assert live.engine.asked_for_state <= 4 + (time.monotonic() - began) / 0.4  # not 24 in 1.2 seconds


def test_a_stream_does_not_hold_up_a_drain() -> None:
    with LiveServer(drain_timeout=100.0) as live:
        response = watch(live, 60.0)
        assert next_event(response) is not None
        live.call(live.stop.first.set)
        assert next_event(response) is None
        assert live.ended(60) == 0


def test_a_dead_engine_ends_the_stream_with_the_reason() -> None:
    with LiveServer(dead_engine_timeout=5.0) as live:
        response = watch(live)
        assert next_event(response) is not None
        live.call(live.engine.die, "it was killed")
        while True:
            event = next_event(response)
            assert event is not None
            if "error" in event:
                break
        assert "it was killed" in json.dumps(event)


def test_the_state_needs_the_key_and_the_page_does_not() -> None:
    with LiveServer(api_key="secret") as live:
        assert live.raw("GET", "/")[0] == 200
        status, _, body = live.raw("GET", "/rvllm/state")
        assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")
        assert live.raw("GET", "/rvllm/state", headers={"Authorization": "Bearer secret"})[0] == 200


def test_what_a_program_needs_to_tokenise_through_us() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with LiveServer(template=template, drain_timeout=0.2) as server:
        status, _, body = server.raw("GET", "/tokenizer_info")
        info = json.loads(body)
        assert (status, info["chat_template"], info["model_max_length"]) == (200, template, CONTEXT)
        status, answer = server.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False)
        assert answer["tokens"] == [server.tokenizer.eos_token_id]
    with LiveServer(texts=False, drain_timeout=0.2) as server:
        assert server.raw("GET", "/tokenizer_info")[0] == 400


@pytest.mark.parametrize(
    ("kernel", "strategy"),
    [
        ("sm90_bf16_gemm_walk_n128", "native"),
        ("sm80_bf16_gemv_n1", "native"),
        ("cublasLtMatmul", "cublas"),
        ("cutlass_gemm_silu", "cutlass"),
        ("compiled linear", "compiled"),
        ("numpy logits", "numpy"),
        ("sm80_bf16_gemm_pack_f16", ""),
        ("compiled norm", ""),
        ("sm80_bf16_attention_decode", ""),
    ],
)
def test_strategies_by_the_names_of_kernels(kernel: str, strategy: str) -> None:
    assert strategy_of(kernel) == strategy
