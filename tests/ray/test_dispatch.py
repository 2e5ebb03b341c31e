"""Which model's application gets a request, over plain ASGI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from rvllm.config import ServerConfig
from rvllm.ray.client import current_session
from rvllm.ray.dispatch import Dispatcher


def named(name: str) -> Any:
    """An application that tells what reached it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        told: dict[str, Any] = {"name": name, "path": scope["path"], "size": len(body)}
        told["session"] = current_session.get()
        if scope["path"] == "/v1/models":
            told = {"object": "list", "data": [{"id": name}]}
        headers = [(b"x-request-id", b"ours"), (b"x-other", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    return app


def ask(dispatcher: Dispatcher, method: str, path: str, **values: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(dispatcher)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **values)

    return asyncio.run(run())


def several(**settings: Any) -> Dispatcher:
    return Dispatcher({"a": named("a"), "b/c": named("b/c")}, ServerConfig(**settings), stateful=False)


@pytest.mark.parametrize(
    ("method", "path", "body", "name", "there"),
    [
        ("POST", "/v1/chat/completions", {"model": "b/c"}, "b/c", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions", {"model": "a"}, "a", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions", {}, "a", "/v1/chat/completions"),
        ("POST", "/v1/messages", {"model": "x"}, "a", "/v1/messages"),  # which says 404 in its own form
        ("POST", "/v1/chat/completions", {"model": 3}, "a", "/v1/chat/completions"),
        ("POST", "/models/b/c/tokenize", {}, "b/c", "/tokenize"),
        ("GET", "/models/b/c/metrics", None, "b/c", "/metrics"),
        ("GET", "/v1/models/b/c", None, "b/c", "/v1/models/b/c"),
        ("GET", "/health", None, "a", "/health"),
    ],
)
def test_the_model_meant(method: str, path: str, body: Any, name: str, there: str) -> None:
    found = ask(several(), method, path, **({} if body is None else {"json": body})).json()
    assert (found["name"], found["path"]) == (name, there)
    if body:
        assert found["size"] > 2


def test_a_model_that_is_not_served_is_told_those_that_are() -> None:
    found = ask(several(), "POST", "/v1/chat/completions", json={"model": "x"})
    assert found.status_code == 404
    assert "'x'" in found.json()["error"]["message"] and "'a' or 'b/c'" in found.json()["error"]["message"]


def test_ray_alone_answers_the_requests_id() -> None:
    headers = ask(several(), "POST", "/v1/completions", json={"model": "a"}).headers
    assert "x-request-id" not in headers and headers["x-other"] == "1"


def test_models_are_listed_together() -> None:
    assert [card["id"] for card in ask(several(), "GET", "/v1/models").json()["data"]] == ["a", "b/c"]
    found = ask(several(), "POST", "/v1/models", json={}).json()["data"]
    assert [card["id"] for card in found] == ["a"], "which no list is asked for: one of them answers it"


def test_state_is_refused_where_it_is_not_kept_and_served_where_it_is() -> None:
    found = ask(several(), "POST", "/v1/responses", json={"model": "a"})
    assert found.status_code == 501
    assert "docs/ray.md" in found.json()["error"]["message"]
    one = Dispatcher({"a": named("a")}, ServerConfig(), stateful=True)
    assert ask(one, "POST", "/v1/responses", json={}).json()["name"] == "a"
    two_fronts = Dispatcher({"a": named("a")}, ServerConfig(), stateful=False)
    assert ask(two_fronts, "GET", "/v1/files").status_code == 501
    assert ask(two_fronts, "POST", "/v1/chat/completions", json={}).json()["name"] == "a"


def test_sessions_reach_the_router() -> None:
    one = Dispatcher({"a": named("a")}, ServerConfig(), stateful=True)
    assert ask(one, "GET", "/health", headers={"x-session-id": "s 1"}).json()["session"] == "s 1"
    assert ask(one, "GET", "/health").json()["session"] is None
    assert len(ask(one, "GET", "/health", headers={"x-session-id": "s" * 999}).json()["session"]) == 256


def test_bodies_have_limits() -> None:
    body = json.dumps({"model": "b/c", "x": "y" * 5000})
    assert ask(several(max_body_mb=0.001), "POST", "/x", content=body).json()["name"] in ("a", "b/c")
    full = several(max_inflight_mb=0.001)
    assert ask(full, "POST", "/x", content=body).status_code == 503
    assert ask(full, "POST", "/x", content=b"{}").status_code == 200  # what was taken was given back


def test_a_body_that_does_not_come_is_given_up() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    asyncio.run(several(body_timeout=0.1)(scope, never, send))
    assert sent[0]["status"] == 408


def test_the_lifespan_is_acknowledged() -> None:
    sent: list[str] = []
    events = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(events)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(several()({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
