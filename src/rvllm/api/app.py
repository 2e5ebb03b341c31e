"""The application: the endpoints of `operations.py` and of the page, routed to who answers them."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from rvllm.api.batches.endpoints import Batches
from rvllm.api.batches.files import Files
from rvllm.api.batches.lines import STATELESS, Answering
from rvllm.api.batches.store import BatchStore
from rvllm.api.docs.page import docs, openapi
from rvllm.api.generate.generation import Service, by_body, by_name, refuse_encoder
from rvllm.api.http.body import parse
from rvllm.api.http.browsers import Guard
from rvllm.api.http.errors import ApiError
from rvllm.api.http.exchange import Endpoint, Exchange, Gate, Handler, openai_failure
from rvllm.api.operations import GROUPS, OPERATIONS, Operation
from rvllm.api.page import page_routes
from rvllm.api.responses.conversations import Conversations
from rvllm.api.responses.endpoints import Responses
from rvllm.api.responses.store import ResponseStore
from rvllm.api.schemas import anthropic
from rvllm.api.system import Health


def build_app(service: Service, gate: Gate) -> Starlette:
    """The ASGI application for a loaded model, and for its siblings.

    Raises UsageError when a store of responses or files cannot be opened.
    """
    owners = {Service: service, Health: Health(gate, service), **_stateful(service, gate)}
    routes = [
        _route(gate, operation, owners[kind]) for kind, operations in GROUPS for operation in operations
    ]
    keys = bool(gate.keys)
    documents = [
        Endpoint(gate, "/openapi.json", partial(openapi, keys), open=True).route("GET"),
        Endpoint(gate, "/docs", partial(docs, service.served_name, keys), open=True).route("GET"),
    ]
    return Starlette(
        routes=[*routes, *documents, *page_routes(service, gate)],
        exception_handlers={HTTPException: _http_error},
        middleware=[Middleware(Guard, gate.config)],
    )


def _stateful(service: Service, gate: Gate) -> dict[type, Any]:
    """Who answers for what the server keeps between requests: responses, conversations, files and batches."""
    config = service.config
    store = ResponseStore(
        config.responses_db, config.responses_ttl_hours * 3600, int(config.responses_max_mb * 1e6)
    )
    gate.closing.append(store.close)
    responses = Responses(service, gate, store)
    files = BatchStore(config.files_dir, int(config.files_max_mb * 1e6))
    gate.closing.append(files.close)
    at_once = config.batch_concurrency or max(1, service.ready.limits.max_num_seqs // 2)
    create = next(operation for operation in OPERATIONS if operation.path == "/v1/responses")
    lines = {**answering(service), create.path: _handler(create, responses)}
    return {
        Responses: responses,
        Conversations: Conversations(store),
        Files: Files(files, int(gate.config.max_file_mb * 1e6)),
        Batches: Batches(files, gate, lines, at_once),
    }


def answering(service: Service) -> dict[str, Answering]:
    """What answers the lines of batches, by path; but for responses, which are kept."""
    return {o.path: _handler(o, service) for o in OPERATIONS if o.path in STATELESS}


def _route(gate: Gate, operation: Operation, owner: Any) -> Route:
    fields = () if operation.request is None else operation.request.__struct_fields__
    failure = anthropic.failure if operation.error is anthropic.MessageError else openai_failure
    receive = owner.receive if operation.form else None
    handler = _handler(operation, owner)
    return Endpoint(
        gate, operation.path, handler, fields, open=operation.open, failure=failure, receive=receive
    ).route(operation.method)


def _handler(operation: Operation, owner: Any) -> Handler:
    """Has `owner` answer; of several models the one that the body names."""

    async def handle(exchange: Exchange, body: bytes) -> None:
        answers = by_body(owner, body) if isinstance(owner, Service) else owner
        if operation.generates:
            refuse_encoder(answers)
        request: Any = None
        if operation.request is not None:
            request = parse(body or b"{}" if operation.bare else body, operation.request)
            if isinstance(owner, Service):
                by_name(answers, request.model)
        await operation.handler(answers, exchange, request)

    return handle


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own refusals (404, 405) as error objects."""
    assert isinstance(error, HTTPException)
    path = str(request.scope["path"])[:200]  # request.url is built from the Host header too
    texts = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
    wrong = ApiError(error.status_code, texts.get(error.status_code, error.detail))
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the router names the methods of the path's first route only
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return Response(
        msgspec.json.encode(wrong.body()),
        error.status_code,
        headers=headers,
        media_type="application/json",
    )


def _methods(request: Request) -> set[str]:
    """All methods that the request's path takes."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found
