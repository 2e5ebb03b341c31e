"""The routes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from rvllm.api.generate.models import ServiceHandler, for_model
from rvllm.api.http.browsers import Guard
from rvllm.api.http.errors import ApiError
from rvllm.api.http.exchange import Endpoint, Exchange, Failure, Gate, openai_failure
from rvllm.api.openai.chat import chat_batch, chat_completions
from rvllm.api.openai.completions import completions
from rvllm.api.openai.embeddings import classify, embeddings, pooling, refuse_encoder, rerank, score
from rvllm.api.openai.generate import generate, generate_tokens
from rvllm.api.openai.render import render_chat, render_completion
from rvllm.api.page import page_routes
from rvllm.api.schemas import anthropic
from rvllm.api.schemas.embeddings import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from rvllm.api.schemas.generate import TokenRequest
from rvllm.api.schemas.requests import ChatBatchRequest, ChatRequest, CompletionRequest
from rvllm.api.stateful import stateful_routes


def build_app(service: Service, gate: Gate) -> Starlette:
    """The ASGI application for a loaded model, and for its siblings."""
    routes = Routes(service, gate)
    return Starlette(
        routes=[
            *routes.of_texts(),
            *stateful_routes(service, gate, answering(service)),
            *routes.of_the_server(),
            *routes.of_documents(),
            *page_routes(service, gate),
        ],
        exception_handlers={HTTPException: _http_error},
        middleware=[Middleware(Guard, gate.config)],
    )


@dataclass(frozen=True)
class Routes:
    """Every handler behind the gate, at its path."""

    service: Service
    gate: Gate

    def route(
        self,
        method: str,
        path: str,
        handler: ServiceHandler,
        fields: tuple[str, ...] = (),
        *,
        name: str | None = None,
        open: bool = False,
        failure: Failure = openai_failure,
    ) -> Route:
        """fields: the body's, which errors may name; open: answered without a key."""
        bound = for_model(self.service, handler)
        endpoint = Endpoint(self.gate, name or path, bound, fields, open=open, failure=failure)
        return Route(path, endpoint, methods=[method])

    def of_texts(self) -> Iterator[Route]:
        """What takes a text or a conversation."""
        for path, (handler, fields) in _stateless().items():
            yield self.route("POST", path, handler, fields)
        batch, message, count = ChatBatchRequest, anthropic.MessagesRequest, anthropic.CountTokensRequest
        for path, answer, fields, failure in (
            ("/v1/chat/completions/batch", chat_batch, batch.__struct_fields__, openai_failure),
            ("/v1/chat/completions/render", render_chat, ChatRequest.__struct_fields__, openai_failure),
            (
                "/v1/completions/render",
                render_completion,
                CompletionRequest.__struct_fields__,
                openai_failure,
            ),
            ("/generate", generate, CompletionRequest.__struct_fields__, openai_failure),
            ("/inference/v1/generate", generate_tokens, TokenRequest.__struct_fields__, openai_failure),
            ("/v1/messages", messages, message.__struct_fields__, anthropic.failure),
            ("/v1/messages/count_tokens", count_tokens, count.__struct_fields__, anthropic.failure),
        ):
            yield self.route("POST", path, generating(answer), fields, failure=failure)
        for paths, take, fields in (
            (("/classify",), classify, ClassifyRequest.__struct_fields__),
            (("/pooling",), pooling, PoolingRequest.__struct_fields__),
            (("/v1/score", "/score"), score, ScoreRequest.__struct_fields__),
            (("/v1/rerank", "/v2/rerank", "/rerank"), rerank, RerankRequest.__struct_fields__),
        ):
            for path in paths:
                yield self.route("POST", path, take, fields)
        yield self.route("POST", "/tokenize", system.tokenize, ("prompt", "messages", "tools"))
        yield self.route("POST", "/detokenize", system.detokenize, ("tokens",))

    def of_the_server(self) -> Iterator[Route]:
        """What tells or changes the server's state."""
        health, ready = partial(system.health, self.gate), partial(system.ready, self.gate)
        yield self.route("GET", "/v1/models", system.list_models)
        yield self.route("GET", "/v1/models/{name:path}", system.get_model, name="/v1/models/NAME")
        for method, path, handler in (
            ("GET", "/health", health),
            ("GET", "/ping", health),
            ("POST", "/ping", health),
            ("GET", "/ready", health),
            ("GET", "/v2/health/ready", ready),
            ("GET", "/v2/health/live", system.live),
            ("GET", "/metrics", system.metrics),
            ("GET", "/version", system.version),
        ):
            yield self.route(method, path, handler, open=True)
        for method, path, handler in (
            ("GET", "/tokenizer_info", system.tokenizer_info),
            ("GET", "/load", system.load),
            ("GET", "/is_sleeping", system.is_sleeping),
            ("POST", "/sleep", system.sleep),
            ("POST", "/wake_up", system.wake_up),
            ("GET", "/server_info", system.server_info),
        ):
            yield self.route(method, path, handler)

    def of_documents(self) -> Iterator[Route]:
        """The description of all the others."""
        keys = bool(self.gate.keys)
        for path, show in (
            ("/openapi.json", partial(openapi, keys)),
            ("/docs", partial(docs, self.service.served_name, keys)),
        ):
            yield Route(path, Endpoint(self.gate, path, show, open=True), methods=["GET"])


def _stateless() -> dict[str, tuple[ServiceHandler, tuple[str, ...]]]:
    """(handler, the body's fields) of what a line of a batch may ask for too, by path."""
    return {
        "/v1/chat/completions": (generating(chat_completions), ChatRequest.__struct_fields__),
        "/v1/completions": (generating(completions), CompletionRequest.__struct_fields__),
        "/v1/embeddings": (embeddings, EmbeddingRequest.__struct_fields__),
    }


def answering(service: Service) -> dict[str, Answering]:
    """The same handlers for the lines of batches, by path."""
    return {path: for_model(service, handler) for path, (handler, _) in _stateless().items()}


def generating(handler: ServiceHandler) -> ServiceHandler:
    """A handler that answers with text: with an encoder loaded, a 400 instead."""

    async def checked(service: Service, exchange: Exchange, body: bytes) -> None:
        refuse_encoder(service)
        await handler(service, exchange, body)

    return checked


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
