"""`/openapi.json`: what the server takes and gives, made from the structs that check and write it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from rvllm.api.batches.endpoints import BatchRequest
from rvllm.api.batches.files import MAX_SECONDS, MIN_SECONDS
from rvllm.api.batches.store import Batch, FileEntry
from rvllm.api.docs.bounds import add_bounds
from rvllm.api.http.errors import ErrorBody
from rvllm.api.http.pagination import Page
from rvllm.api.responses.conversations import ConversationRequest, ItemsRequest
from rvllm.api.responses.store import Conversation
from rvllm.api.schemas import answers, anthropic
from rvllm.api.schemas.embeddings import (
    ClassifyAnswer,
    ClassifyRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    PoolingAnswer,
    PoolingRequest,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
)
from rvllm.api.schemas.generate import GeneratedTexts, GeneratedTokens, TokenRequest
from rvllm.api.schemas.requests import (
    ChatBatchRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Refused,
    TokenizeRequest,
)
from rvllm.api.schemas.responses import ResponseAnswer, ResponsesRequest
from rvllm.version import __version__

REF = "#/components/schemas/{name}"
_LIST = ("after", "limit", "order")
_INTEGERS = {"limit", "starting_after", "level"}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch", "user_data"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
    },
}


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    form: the body is a form with a file; events: it can answer as a stream, with such data in its events;
    bare: it may come without a body.
    """

    method: str
    path: str
    summary: str
    request: type[msgspec.Struct] | None = None
    answer: Any = None
    query: tuple[str, ...] = ()
    events: Any = None
    form: bool = False
    content: str = "application/json"
    open: bool = False  # needs no key
    error: type[msgspec.Struct] = ErrorBody
    bare: bool = False
    most: int = 100  # of a list's entries on a page


OPERATIONS = (
    Operation("POST", "/v1/chat/completions", "The assistant's next message.", ChatRequest,
              answers.ChatAnswer, events=answers.ChatChunk),
    Operation("POST", "/v1/chat/completions/batch", "Several conversations' next messages.",
              ChatBatchRequest, answers.ChatAnswer),
    Operation("POST", "/v1/chat/completions/render", "The tokens of its prompt; nothing is generated.",
              ChatRequest, answers.Rendered),
    Operation("POST", "/v1/completions", "Continuations of texts.", CompletionRequest,
              answers.CompletionAnswer, events=answers.CompletionAnswer),
    Operation("POST", "/v1/completions/render", "The tokens of each prompt; nothing is generated.",
              CompletionRequest, list[answers.Rendered]),
    Operation("POST", "/generate", "A text and what follows it, as vLLM's plain server has it.",
              CompletionRequest, GeneratedTexts),
    Operation("POST", "/inference/v1/generate", "Token ids that follow token ids.", TokenRequest,
              GeneratedTokens, events=GeneratedTokens),
    Operation("POST", "/v1/messages", "The assistant's next message, in Anthropic's form.",
              anthropic.MessagesRequest, anthropic.MessageAnswer, events=dict[str, Any],
              error=anthropic.MessageError),
    Operation("POST", "/v1/messages/count_tokens", "How many tokens a conversation has.",
              anthropic.CountTokensRequest, anthropic.TokenCount, error=anthropic.MessageError),
    Operation("POST", "/v1/responses", "An answer that the server keeps.", ResponsesRequest, ResponseAnswer,
              events=dict[str, Any]),
    Operation("GET", "/v1/responses/{id}", "A kept answer, or its events again.", None, ResponseAnswer,
              query=("stream", "starting_after"), events=dict[str, Any]),
    Operation("DELETE", "/v1/responses/{id}", "Forgets an answer."),
    Operation("POST", "/v1/responses/{id}/cancel", "Ends an answer made in the background.", None,
              ResponseAnswer),
    Operation("GET", "/v1/responses/{id}/input_items", "What an answer answers.", None, Page[Any],
              query=_LIST),
    Operation("POST", "/v1/conversations", "A new conversation.", ConversationRequest, Conversation,
              bare=True),
    Operation("GET", "/v1/conversations/{id}", "A conversation.", None, Conversation),
    Operation("POST", "/v1/conversations/{id}", "Changes its metadata.", ConversationRequest, Conversation),
    Operation("DELETE", "/v1/conversations/{id}", "Forgets a conversation."),
    Operation("POST", "/v1/conversations/{id}/items", "Adds items.", ItemsRequest, Page[Any]),
    Operation("GET", "/v1/conversations/{id}/items", "Its items.", None, Page[Any], query=_LIST),
    Operation("GET", "/v1/conversations/{id}/items/{item}", "One item.", None, dict[str, Any]),
    Operation("DELETE", "/v1/conversations/{id}/items/{item}", "Forgets an item.", None, Conversation),
    Operation("POST", "/v1/files", "Uploads a file.", None, FileEntry, form=True),
    Operation("GET", "/v1/files", "All files.", None, Page[FileEntry], query=("purpose", *_LIST),
              most=10_000),
    Operation("GET", "/v1/files/{id}", "A file's entry.", None, FileEntry),
    Operation("DELETE", "/v1/files/{id}", "Deletes a file."),
    Operation("GET", "/v1/files/{id}/content", "A file's content.", content="application/octet-stream"),
    Operation("POST", "/v1/batches", "Answers a file of requests.", BatchRequest, Batch),
    Operation("GET", "/v1/batches", "All batches.", None, Page[Batch], query=_LIST),
    Operation("GET", "/v1/batches/{id}", "A batch.", None, Batch),
    Operation("DELETE", "/v1/batches/{id}", "Forgets a batch that has ended; its files stay."),
    Operation("POST", "/v1/batches/{id}/cancel", "Ends a batch; what was answered is kept.", None, Batch),
    Operation("POST", "/v1/embeddings", "Vectors of texts.", EmbeddingRequest, EmbeddingAnswer),
    Operation("POST", "/classify", "Classes of texts.", ClassifyRequest, ClassifyAnswer),
    Operation("POST", "/pooling", "What the model gives for texts.", PoolingRequest, PoolingAnswer),
    *(
        Operation("POST", path, "How alike texts are.", ScoreRequest, ScoreAnswer)
        for path in ("/v1/score", "/score")
    ),
    *(
        Operation("POST", path, "Documents in order of likeness.", RerankRequest, RerankAnswer)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ),
    Operation("GET", "/v1/models", "The model served.", None, answers.ModelList),
    Operation("GET", "/v1/models/{name}", "The model served.", None, answers.ModelCard),
    Operation("POST", "/tokenize", "A text's or conversation's tokens.", TokenizeRequest, answers.Tokens),
    Operation("POST", "/detokenize", "The text of tokens.", DetokenizeRequest, answers.Text),
    Operation("GET", "/tokenizer_info", "Special tokens and the chat template.", None, answers.TokenizerInfo),
    Operation("GET", "/health", "200 while requests are answered.", open=True),
    *(
        Operation(method, "/ping", "The same as /health.", open=True) for method in ("GET", "POST")
    ),
    Operation("GET", "/ready", "The same as /health.", open=True),
    Operation("GET", "/v2/health/ready", "Whether requests are answered.", None, dict[str, bool], open=True),
    Operation("GET", "/v2/health/live", "200 while the process answers.", None, dict[str, bool], open=True),
    Operation("GET", "/load", "Choices that run or wait.", None, dict[str, int]),
    Operation("POST", "/sleep", "Gives the engine's memory back (--enable-sleep-mode).", None, dict[str, Any],
              query=("level", "kv_cache"), bare=True),
    Operation("POST", "/wake_up", "Takes it again.", None, dict[str, Any], bare=True),
    Operation("GET", "/is_sleeping", "Whether the model is asleep.", None, dict[str, bool]),
    Operation("GET", "/server_info", "What is served, and how.", None, dict[str, Any]),
    Operation("GET", "/metrics", "Figures for Prometheus.", content="text/plain", open=True),
    Operation("GET", "/version", "The server's version.", None, dict[str, str], open=True),
)  # fmt: skip


@cache
def document(keyed: bool = True) -> dict[str, Any]:
    """The OpenAPI 3.1 document. keyed: whether the server asks for a key."""
    kinds = _kinds()
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    known = dict(zip(map(str, kinds), schemas, strict=True))
    for kind in (ChatRequest, CompletionRequest):  # what is always refused is no part of what is taken
        properties = components[kind.__name__]["properties"]
        for name in Refused.__struct_fields__:
            properties.pop(name, None)
    add_bounds(components)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, known)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "rvLLM", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        found["security"] = [{"bearer": []}, {"header": []}]
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return found


def _kinds() -> list[Any]:
    found: dict[str, Any] = {}
    for operation in OPERATIONS:
        for kind in (operation.error, operation.request, operation.answer, operation.events):
            if kind is not None:
                found[str(kind)] = kind
    return list(found.values())


def _described(operation: Operation, known: dict[str, Any]) -> dict[str, Any]:
    answer = known[str(operation.answer)] if operation.answer is not None else {}
    content = {operation.content: {"schema": answer}}
    if operation.events:
        content["text/event-stream"] = {"schema": _event(known[str(operation.events)])}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").strip("_"),
        "parameters": list(_parameters(operation)),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": known[str(operation.error)]}},
            },
        },
    }
    if operation.request is not None:
        schema = {"application/json": {"schema": known[str(operation.request)]}}
        described["requestBody"] = {"required": not operation.bare, "content": schema}
    elif operation.form:
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    if operation.open:
        described["security"] = []
    return described


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event; all but OpenAI's last one, `[DONE]`, carry JSON."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": text}, "required": ["data"]}


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", operation.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    for name in operation.query:
        schema: dict[str, Any] = (
            {"type": "integer", "minimum": 0, "maximum": 1 << 31} if name in _INTEGERS else {"type": "string"}
        )
        if name == "limit":
            schema |= {"minimum": 1, "maximum": operation.most}
        elif name == "order":
            schema["enum"] = ["asc", "desc"]
        elif name == "stream":
            schema = {"type": "boolean"}
        yield {"name": name, "in": "query", "required": False, "schema": schema}
