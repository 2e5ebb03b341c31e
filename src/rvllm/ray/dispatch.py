"""The application in front of the models': which one a request is for, and the session it belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rvllm.api.http.errors import ApiError
from rvllm.api.http.exchange import check_model
from rvllm.api.http.limits import BODY_RATE, BodyBudget
from rvllm.config import ServerConfig
from rvllm.ray.client import current_session

SESSION = b"x-session-id"  # Ray's name for it
MAX_SESSION = 256  # bytes of it that count
KEPT = ("/v1/responses", "/v1/conversations", "/v1/files", "/v1/batches")  # state of one process
OTHER_ERRORS = ("/v1/messages",)  # answered with errors of another form: by the first application
NOT_KEPT = (
    "what is kept between requests is served with one front end and one model only; "
    "this application has several (docs/ray.md)"
)


class _Asked(msgspec.Struct):
    """What of a body says which model is meant."""

    model: str | None = None


class Dispatcher:
    """An ASGI application that hands each request to its model's own.

    A path may begin with /models/NAME; else `model` in the body of a POST says it, and what says nothing is
    for the first. `/v1/models` lists all.
    """

    def __init__(self, apps: Mapping[str, ASGIApp], config: ServerConfig, stateful: bool) -> None:
        self._apps, self._config, self._stateful = dict(apps), config, stateful
        self._first = next(iter(self._apps.values()))
        self._budget = BodyBudget(int(config.max_inflight_mb * 1e6))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; `lifespan` is acknowledged."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
            return
        send = _without_id(send)
        session = next((value for name, value in scope["headers"] if name == SESSION), b"")
        current_session.set(session[:MAX_SESSION].decode("latin-1") or None)
        if len(self._apps) == 1 and self._stateful:
            await self._first(scope, receive, send)
            return
        path = scope["path"]
        if not self._stateful and path.startswith(KEPT):
            await _refuse(ApiError(501, NOT_KEPT, code="not_served"), send)
        elif (named := self._by_path(path)) is not None:
            app, rest = named
            await app({**scope, "path": rest, "raw_path": rest.encode()}, receive, send)
        elif path == "/v1/models" and scope["method"] == "GET":
            await self._list(scope, receive, send)
        elif scope["method"] == "POST" and len(self._apps) > 1:
            await self._by_body(scope, receive, send)
        else:
            await self._first(scope, receive, send)

    def _by_path(self, path: str) -> tuple[ASGIApp, str] | None:
        """(the model's application, the path there) of /models/NAME/... and /v1/models/NAME."""
        for name, app in self._apps.items():
            if path.startswith(f"/models/{name}/"):
                return app, path.removeprefix(f"/models/{name}")
            if path == f"/v1/models/{name}":
                return app, path
        return None

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The lists of all models as one."""
        cards: list[Any] = []
        for app in self._apps.values():
            answer = _Answer()
            await app(scope, _nothing_more(), answer.send)
            if answer.status != 200:
                await answer.hand_on(send)
                return
            cards += msgspec.json.decode(answer.body)["data"]
        await _respond(200, {"object": "list", "data": cards}, send)

    async def _by_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body as far as it may go, looks for `model`, and hands on what was read."""
        taken: list[Message] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_timeout) as due:
                began = asyncio.get_running_loop().time()
                while size <= self._config.max_body_mb * 1e6:
                    message = await receive()
                    taken.append(message)
                    self._budget.take(len(message.get("body", b"")))
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
                    due.reschedule(began + self._config.body_timeout + size / BODY_RATE)
            model = _model_of(taken)
            if not scope["path"].startswith(OTHER_ERRORS):
                check_model(model, list(self._apps))
            app = self._apps.get(model or "", self._first)
            await app(scope, _again(taken, receive), send)
        except TimeoutError:
            await _refuse(ApiError(408, "the body did not arrive in time (--body-timeout)"), send)
        except ApiError as error:
            await _refuse(error, send)
        finally:
            self._budget.give(size)


def _without_id(send: Send) -> Send:
    """Leaves x-request-id out of responses: Ray adds the same, put into the request before."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
        await send(message)

    return sent


def _model_of(messages: Sequence[Message]) -> str | None:
    body = b"".join(message.get("body", b"") for message in messages)
    try:
        return msgspec.json.decode(body, type=_Asked).model
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None  # the application that gets it says what is wrong


def _again(taken: Sequence[Message], receive: Receive) -> Receive:
    """The messages that were taken, then those to come."""
    left = list(taken)

    async def replay() -> Message:
        return left.pop(0) if left else await receive()

    return replay


def _nothing_more() -> Receive:
    async def never() -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    return never


class _Answer:
    """A response that is kept instead of sent."""

    def __init__(self) -> None:
        self.status, self.body, self._messages = 0, b"", list[Message]()

    async def send(self, message: Message) -> None:
        """Takes a part of it."""
        self._messages.append(message)
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def hand_on(self, send: Send) -> None:
        """Sends it after all."""
        for message in self._messages:
            await send(message)


async def _refuse(error: ApiError, send: Send) -> None:
    await _respond(error.status, error.body(), send)


async def _respond(status: int, value: Any, send: Send) -> None:
    body = msgspec.json.encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _acknowledge(receive: Receive, send: Send) -> None:
    while True:
        what = (await receive())["type"]
        await send({"type": f"{what}.complete"})
        if what == "lifespan.shutdown":
            return
