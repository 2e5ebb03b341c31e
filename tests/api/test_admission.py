"""Who is let in, how long they may take, and whose requests they are."""

from __future__ import annotations

import json

import msgspec
import pytest

from rvllm.api.generate import job
from rvllm.engine.ipc.messages import Output
from support.doubles.server import LiveServer

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def ask(server: LiveServer, headers: dict[str, str] | None = None, **more: object) -> tuple[int, dict, dict]:
    status, head, body = server.raw("POST", CHAT, json.dumps({**HELLO, **more}).encode(), headers or {})
    return status, dict(head), json.loads(body)


def scheduled(server: LiveServer, **settings: str) -> None:
    server.service.ready = msgspec.structs.replace(server.service.ready, **settings)


def test_retry_after_follows_the_pace_at_which_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    retry = job.Retry()
    assert retry.seconds(5) == 1, "nothing is known yet"
    for _ in range(10):
        now[0] += 2.0
        retry.ended()
    assert (retry.seconds(1), retry.seconds(4), retry.seconds(1000)) == (2, 8, 60)
    now[0] += 100.0
    assert retry.seconds(1) == 12, "a queue that stands is not run against"


def test_a_request_that_waited_too_long_may_come_back() -> None:
    with LiveServer() as server:

        def too_long(request: object) -> list[Output]:
            return [Output(request.request_id, [], finish_reason="error", error="waited",
                           waited_too_long=True)]  # fmt: skip

        server.engine._outputs = too_long
        status, head, answer = ask(server)
        assert (status, answer["error"]["code"], head["retry-after"]) == (429, "overloaded", "1")


def test_a_request_may_bring_its_own_deadline() -> None:
    with LiveServer(request_timeout=5.0, drain_timeout=0.2) as server:
        server.engine.held = True
        status, _, answer = ask(server, {"x-request-timeout": "0.1"})
        assert status == 408 and "0.1 s (x-request-timeout)" in answer["error"]["message"]
        assert not server.engine.open
        server.engine.held = False
        assert ask(server, {"x-request-timeout": "60"})[0] == 200
        for wrong in ("soon", "-1", "0", "nan", "inf"):
            assert ask(server, {"x-request-timeout": wrong})[0] == 400


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_a_priority_that_nothing_heeds_is_refused(policy: str) -> None:
    with LiveServer() as server:
        scheduled(server, scheduling_policy=policy)
        status, _, answer = ask(server, priority=4)
        assert (status, answer["error"]["param"]) == (400, "priority") and policy in answer["error"][
            "message"
        ]
        assert ask(server, priority=0)[0] == 200
        assert ask(server, priority=job.BATCH_PRIORITY)[0] == 200, "batches carry it"


def test_requests_belong_to_clients() -> None:
    with LiveServer(api_key="one\ntwo") as server:
        keys = [{"authorization": "Bearer one"}, {"x-api-key": "two"}, {"authorization": "Bearer one"}]
        for fairness, distinct in (("none", 1), ("api-key", 2), ("user", 3)):
            scheduled(server, fairness=fairness)
            for key, user in zip(keys, ("ann", "bob", None), strict=True):
                assert ask(server, key, **({"user": user} if user else {}))[0] == 200
            clients = [request.client for request in server.engine.requests[-3:]]
            assert len(set(clients)) == distinct
            assert not {"one", "two", "ann", "bob"} & set(clients)
            assert fairness != "api-key" or clients[0] == clients[2]


def test_choices_of_a_prompt_are_a_group() -> None:
    with LiveServer() as server:
        ask(server, n=3)
        groups = [request.group for request in server.engine.requests]
        assert len(groups) == 3 and len(set(groups)) == 1 and groups[0]
        ask(server)
        assert server.engine.requests[-1].group == ""


def test_sleep_and_wake_up_over_http() -> None:
    with LiveServer(drain_timeout=0.2) as server:
        assert server.raw("POST", "/sleep")[0] == 400, "not without --enable-sleep-mode"
        scheduled(server, sleep_mode=True)
        for path, sleeping in (("/sleep?level=2", True), ("/wake_up", False), ("/sleep", True)):
            status, _, body = server.raw("POST", path)
            assert status == 200 and json.loads(body) == {"is_sleeping": sleeping, "seconds": 0.5}
            assert json.loads(server.raw("GET", "/is_sleeping")[2]) == {"is_sleeping": sleeping}
        assert server.engine.sleep_level == 1 and not server.engine.keeps
        for query in ("level=3", "kv_cache=both", "level=2&kv_cache=keep"):
            assert server.raw("POST", f"/sleep?{query}")[0] == 400
        assert server.raw("POST", "/sleep?kv_cache=keep")[0] == 200 and server.engine.keeps
        assert ask(server, {"x-request-timeout": "0.2"})[0] == 408, "requests wait"
        assert server.raw("POST", "/wake_up?tags=weights")[0] == 400, "all of it or nothing"
        assert server.engine.sleep_level == 1
        server.raw("POST", "/wake_up?tags=weights&tags=kv_cache")
        assert ask(server)[0] == 200
