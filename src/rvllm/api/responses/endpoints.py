"""OpenAI's `/v1/responses`: create, look at, cancel and delete answers that the server keeps."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rvllm.api.disk import is_full
from rvllm.api.generate.answer import Answer
from rvllm.api.generate.generation import Service, by_name, refuse_encoder
from rvllm.api.generate.logprobs import Names, chat_logprobs
from rvllm.api.http.errors import ApiError, busy, field_names, invalid, unknown
from rvllm.api.http.exchange import Exchange, Gate
from rvllm.api.http.pagination import Query, page
from rvllm.api.responses.events import ResponseWriter, snapshot
from rvllm.api.responses.store import ResponseStore
from rvllm.api.schemas.answers import now
from rvllm.api.schemas.items import CALLS, OUTPUTS, Item, checked_items
from rvllm.api.schemas.requests import ChatRequest
from rvllm.api.schemas.responses import (
    CHAT_NAMES,
    ResponseAnswer,
    ResponsesRequest,
    check_request,
    conversation,
    new_response,
)
from rvllm.telemetry import logs

_ENDED = ("completed", "incomplete", "failed", "cancelled")


@dataclass
class _Live:
    """A response that is being generated."""

    response: ResponseAnswer
    context: list[Item]
    new: list[Item]  # of the context, what this request brought
    events: list[dict[str, Any]] | None = None  # kept of what is made in the background
    grown: asyncio.Event = field(default_factory=asyncio.Event)  # set, then replaced, with each event
    task: asyncio.Task[None] | None = None
    cancelled: bool = False  # by its client

    async def add(self, kind: str, event: dict[str, Any]) -> None:
        """Keeps an event for those who stream the response."""
        assert self.events is not None
        self.events.append(snapshot(event))
        self.wake()

    def wake(self) -> None:
        """Lets those who stream look again."""
        self.grown.set()
        self.grown = asyncio.Event()


class Responses:
    """The endpoints; `store` keeps what they answer."""

    def __init__(self, service: Service, gate: Gate, store: ResponseStore) -> None:
        self._service, self._gate, self._store = service, gate, store
        self._live: dict[str, _Live] = {}

    async def create(self, exchange: Exchange, request: ResponsesRequest) -> None:
        """`POST /v1/responses`: answers whole, as a stream, or at once with more to come."""
        service = by_name(self._service, request.model)
        refuse_encoder(service)
        check_request(request)
        before, new = self._context(request)
        response = new_response(request, f"resp_{exchange.request_id}", service.served_name, now())
        live = _Live(response, [*before, *new], new, [] if request.background else None)
        conversation(request, live.context)  # refuses what does not fit together before anything begins
        if request.background:
            self._start(service, request, live)
            if request.stream:
                await self._follow(exchange, live, -1)
            else:
                await exchange.json(response)
            return

        async def tell(kind: str, event: dict[str, Any]) -> None:
            if request.stream:
                if not exchange.streaming:
                    await exchange.open_stream()
                await exchange.event(event, kind)

        writer = ResponseWriter(response, tell)
        try:
            await self._generate(service, request, live.context, writer)
        except ApiError as error:
            if not exchange.streaming:
                raise
            exchange.status = error.status
            await writer.fail(error)
        except asyncio.CancelledError:  # the client has left, or the server stops
            if exchange.streaming:  # so the client knows its id and may ask for it
                writer.abandon(busy("the server is shutting down") if self._gate.draining else None)
                self._keep(live)
            raise
        self._keep(live)
        if request.stream:
            await exchange.end_stream()
        else:
            await exchange.json(response)

    async def retrieve(self, exchange: Exchange, request: None) -> None:
        """`GET /v1/responses/{id}`: the response, or with `stream=true` its events after `starting_after`."""
        name, query = exchange.scope["path_params"]["id"], Query(exchange)
        live, start = self._found(name), query.number("starting_after", -1, 0, 1 << 31)
        if not query.truth("stream"):
            await exchange.json(live.response)
        elif live.events is None:
            raise invalid("only responses made in the background can be streamed again", "stream")
        else:
            await self._follow(exchange, live, start)

    async def delete(self, exchange: Exchange, request: None) -> None:
        name = exchange.scope["path_params"]["id"]
        await self._cancel(name)
        if not self._store.delete(name):
            raise _missing(name)
        await exchange.json({"id": name, "object": "response", "deleted": True})

    async def cancel(self, exchange: Exchange, request: None) -> None:
        """`POST /v1/responses/{id}/cancel`: ends a response that is made in the background."""
        name = exchange.scope["path_params"]["id"]
        await self._cancel(name)
        response = self._found(name).response
        if not response.background:
            raise invalid("only responses made in the background can be cancelled", "response_id")
        await exchange.json(response)

    async def input_items(self, exchange: Exchange, request: None) -> None:
        """`GET /v1/responses/{id}/input_items`: all that the response answers, earlier responses included."""
        name = exchange.scope["path_params"]["id"]
        await exchange.json(page(self._found(name).context, lambda item: str(item["id"]), Query(exchange)))

    def _context(self, request: ResponsesRequest) -> tuple[list[Item], list[Item]]:
        """The items to answer: (those of the conversation or of the previous responses, the new ones)."""
        before: list[Item] = []
        if request.previous_response_id is not None:
            name = request.previous_response_id
            previous = None if name in self._live else self._store.get(name)
            if previous is None or previous.response.status not in _ENDED:
                what = "is still in progress" if name in self._live else "is not (or no longer) kept here"
                raise ApiError(404 if name not in self._live else 400,
                               f"previous_response_id: {name[:80]!r} {what}",
                               param="previous_response_id", code="previous_response_not_found")  # fmt: skip
            before = [*previous.context, *previous.response.output]
        elif request.conversation is not None:
            name = request.conversation if isinstance(request.conversation, str) else request.conversation.id
            if self._store.conversation(name) is None:
                raise unknown("conversation", name, "conversation")
            before = self._store.items(name)
        known = {item["id"]: item for item in before}
        new = checked_items(request.input, known.get)
        if not (before or new or request.instructions):
            raise invalid("input must not be empty", "input")
        return before, new

    async def _generate(
        self,
        service: Service,
        request: ResponsesRequest,
        context: Sequence[Item],
        writer: ResponseWriter,
    ) -> None:
        """Runs the request; with truncation "auto" the oldest items go until the rest fits."""
        items = list(context)
        while True:
            try:
                await _answer(service, conversation(request, items), writer)
                break
            except ApiError as error:
                full = error.code == "context_length_exceeded" and not writer.begun
                if not (full and request.truncation == "auto" and len(items) > 1):
                    raise
                items = _shorter(items)
        await writer.finish()

    def _start(self, service: Service, request: ResponsesRequest, live: _Live) -> None:
        response = live.response
        response.status = "queued"
        self._store.put(response, live.context)
        self._live[response.id] = live
        live.task = self._gate.start(self._background(service, request, live))

    async def _background(self, service: Service, request: ResponsesRequest, live: _Live) -> None:
        response = live.response
        writer = ResponseWriter(response, live.add)
        try:
            await writer.begin()
            await self._generate(service, request, live.context, writer)
        except ApiError as error:
            await writer.fail(error)
        except asyncio.CancelledError:
            if live.cancelled:
                writer.abandon()
            else:
                await writer.fail(busy("the server is shutting down"))
        finally:
            del self._live[response.id]
            self._keep(live)
            live.wake()

    async def _cancel(self, name: str) -> None:
        """Ends a response that is still made in the background."""
        live = self._live.get(name)
        if live is None:
            return
        assert live.task is not None
        live.cancelled = True
        live.task.cancel()
        await asyncio.gather(live.task, return_exceptions=True)

    async def _follow(self, exchange: Exchange, live: _Live, start: int) -> None:
        """Streams a response's events from number `start` + 1 on until it has ended."""
        await exchange.open_stream()
        sent = start + 1
        while True:
            grown, events = live.grown, live.events or []
            for event in events[sent:]:
                await exchange.event(event, event["type"])
                sent += 1
            if sent >= len(events):
                if live.response.id not in self._live:
                    break
                await grown.wait()
        await exchange.end_stream()

    def _keep(self, live: _Live) -> None:
        """Keeps a response that has been made. On a full disk the client has its answer all the same; that it
        is not kept, the answer's `store` tells where it is not sent yet."""
        response = live.response
        try:
            if response.store:
                self._store.put(response, live.context, live.events)
            if response.conversation is not None and response.status in ("completed", "incomplete"):
                self._store.add_items(response.conversation.id, [*live.new, *response.output])
        except (OSError, sqlite3.Error) as error:
            if not is_full(error):
                raise
            response.store = False
            logs.event(logging.WARNING, "the disk is full: a response is not kept", id=response.id)

    def _found(self, name: str) -> _Live:
        """A response while it is made or as it is kept. Raises a 404."""
        live = self._live.get(name)
        if live is None:
            stored = self._store.get(name)
            if stored is None:
                raise _missing(name)
            live = _Live(stored.response, stored.context, [], stored.events)
        return live


async def _answer(service: Service, chat: ChatRequest, writer: ResponseWriter) -> None:
    with field_names(CHAT_NAMES, ChatRequest.__struct_fields__):
        size = len(msgspec.json.encode(chat.messages))
        answer = await Answer.start(service, writer.response.id, chat, size)
        names, top = Names(service.tokenizer, False), chat.top_logprobs or 0
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                logprobs: list[dict[str, Any]] = []
                if chat.logprobs and delta.logprobs:
                    logprobs = msgspec.to_builtins(chat_logprobs(delta.logprobs, top, names).content)
                await writer.take(delta, answer.usage, logprobs)


def _shorter(items: list[Item]) -> list[Item]:
    """Without the oldest eighth, and without outputs whose calls are gone."""
    rest = items[max(1, len(items) // 8) :]
    calls = {item["call_id"] for item in rest if item["type"] in CALLS}
    kept = [item for item in rest if item["type"] not in OUTPUTS or item["call_id"] in calls]
    return kept or rest


def _missing(name: str) -> ApiError:
    return ApiError(404, f"there is no response {name[:80]!r} (any more)", param="response_id")
