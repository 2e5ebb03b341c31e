"""The routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from rvllm.api import system
from rvllm.api.anthropic.messages import count_tokens, messages
from rvllm.api.batches.lines import Answering
from rvllm.api.docs.page import docs, openapi
from rvllm.api.generate.generation import Service
from rvllm.api.http.browsers import Guard
from rvllm.api.http.errors import ApiError
from rvllm.api.http.exchange import Endpoint, Exchange, Failure, Gate, openai_failure
from rvllm.api.openai.chat import chat_batch, chat_completions
from rvllm.api.openai.completions import completions
from rvllm.api.openai.embeddings import classify, embeddings, pooling, refuse_encoder, rerank, score
from rvllm.api.page import page_routes
from rvllm.api.schemas import anthropic
from rvllm.api.schemas.embeddings import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from rvllm.api.schemas.requests import ChatBatchRequest, ChatRequest, CompletionRequest
from rvllm.api.stateful import stateful_routes

ServiceHandler = Callable[[Service, Exchange, bytes], Awaitable[None]]


def build_app(service: Service, gate: Gate) -> Starlette:
    """The ASGI application for a loaded model."""

    def route(
        method: str,
        path: str,
        handler: ServiceHandler,
        fields: tuple[str, ...] = (),
        *,
        name: str | None = None,
        open: bool = False,
        failure: Failure = openai_failure,
    ) -> Route:
        bound = partial(handler, service)
        endpoint = Endpoint(gate, name or path, bound, fields, open=open, failure=failure)  # type: ignore[arg-type]
        return Route(path, endpoint, methods=[method])

    stateless = _stateless()
    return Starlette(
        routes=[
            *(route("POST", path, handler, fields) for path, (handler, fields) in stateless.items()),
            route(
                "POST",
                "/v1/chat/completions/batch",
                generating(chat_batch),
                ChatBatchRequest.__struct_fields__,
            ),
            *(
                route("POST", path, generating(handler), fields, failure=anthropic.failure)
                for path, handler, fields in (
                    ("/v1/messages", messages, anthropic.MessagesRequest.__struct_fields__),
                    (
                        "/v1/messages/count_tokens",
                        count_tokens,
                        anthropic.CountTokensRequest.__struct_fields__,
                    ),
                )
            ),
            *(
                route("POST", path, handler, fields)
                for paths, handler, fields in (
                    (("/classify",), classify, ClassifyRequest.__struct_fields__),
                    (("/pooling",), pooling, PoolingRequest.__struct_fields__),
                    (("/v1/score", "/score"), score, ScoreRequest.__struct_fields__),
                    (("/v1/rerank", "/v2/rerank", "/rerank"), rerank, RerankRequest.__struct_fields__),
                )
                for path in paths
            ),
            route("GET", "/v1/models", system.list_models),
            route("GET", "/v1/models/{name:path}", system.get_model, name="/v1/models/NAME"),
            route("POST", "/tokenize", system.tokenize, ("prompt", "messages", "tools")),
            route("POST", "/detokenize", system.detokenize, ("tokens",)),
            route("GET", "/tokenizer_info", system.tokenizer_info),
            *stateful_routes(service, gate, answering(service)),
            route("GET", "/health", partial(system.health, gate), open=True),
            *(route(method, "/ping", partial(system.health, gate), open=True) for method in ("GET", "POST")),
            route("GET", "/ready", partial(system.health, gate), open=True),
            route("GET", "/v2/health/ready", partial(system.ready, gate), open=True),
            route("GET", "/v2/health/live", system.live, open=True),
            route("GET", "/metrics", system.metrics, open=True),
            route("GET", "/load", system.load),
            route("GET", "/is_sleeping", system.is_sleeping),
            route("POST", "/sleep", system.sleep),
            route("POST", "/wake_up", system.wake_up),
            route("GET", "/server_info", system.server_info),
            route("GET", "/version", system.version, open=True),
            Route(
                "/openapi.json",
                Endpoint(gate, "/openapi.json", partial(openapi, bool(gate.keys)), open=True),
                methods=["GET"],
            ),
            Route(
                "/docs",
                Endpoint(gate, "/docs", partial(docs, service.served_name, bool(gate.keys)), open=True),
                methods=["GET"],
            ),
            *page_routes(service, gate),
        ],
        exception_handlers={HTTPException: _http_error},
        middleware=[Middleware(Guard, gate.config)],
    )


def _stateless() -> dict[str, tuple[ServiceHandler, tuple[str, ...]]]:
    """(handler, the body's fields) of what a line of a batch may ask for too, by path."""
    return {
        "/v1/chat/completions": (generating(chat_completions), ChatRequest.__struct_fields__),
        "/v1/completions": (generating(completions), CompletionRequest.__struct_fields__),
        "/v1/embeddings": (embeddings, EmbeddingRequest.__struct_fields__),
    }


def answering(service: Service) -> dict[str, Answering]:
    """The same handlers for the lines of batches, by path."""
    return {path: partial(handler, service) for path, (handler, _) in _stateless().items()}


def generating(handler: ServiceHandler) -> ServiceHandler:
    """A handler that answers with text: with an encoder loaded, a 400 instead."""

    async def checked(service: Service, exchange: Exchange, body: bytes) -> None:
        refuse_encoder(service)
        await handler(service, exchange, body)

    return checked


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own refusals (404, 405) as error objects."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
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
