"""`/openapi.json`: what the server takes and gives, made from the structs that check and write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec

from rvllm.api.batches.files import MAX_SECONDS, MIN_SECONDS
from rvllm.api.batches.lines import ENDPOINTS
from rvllm.api.generate.conversation import ROLES
from rvllm.api.operations import OPERATIONS, Operation
from rvllm.api.schemas.requests import ChatRequest, CompletionRequest, Refused
from rvllm.engine.sampling_params import RANGES
from rvllm.version import __version__

REF = "#/components/schemas/{name}"
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

# What the types of fields do not tell: ranges of numbers, lists that must not be empty, words.
# Other surfaces' names of sampling parameters.
_SAME = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "top_logprobs": "logprobs"}
_FILLED = {"minItems": 1}
# By struct and field; these go before the ranges.
_BOUNDS: dict[tuple[str, str], dict[str, Any]] = {
    ("Message", "role"): {"enum": list(ROLES)},
    ("Turn", "role"): {"enum": ["user", "assistant"]},
    ("ChatRequest", "messages"): _FILLED,
    ("MessagesRequest", "messages"): _FILLED,
    ("CountTokensRequest", "messages"): _FILLED,
    ("CompletionRequest", "prompt"): {"minLength": 1, **_FILLED},
    ("CompletionRequest", "max_tokens"): {"minimum": 0},  # 0 with echo
    ("EmbeddingRequest", "input"): _FILLED,
    ("EmbeddingRequest", "dimensions"): {"minimum": 1},
    ("EmbeddingRequest", "encoding_format"): {"enum": ["float", "base64", None]},
    ("ClassifyRequest", "input"): _FILLED,
    ("PoolingRequest", "input"): _FILLED,
    ("PoolingRequest", "dimensions"): {"minimum": 1},
    ("PoolingRequest", "encoding_format"): {"enum": ["float", "base64", None]},
    ("PoolingRequest", "task"): {"enum": ["embed", "classify", None]},
    ("ChatRequest", "allowed_token_ids"): _FILLED,
    ("CompletionRequest", "allowed_token_ids"): _FILLED,
    ("ScoreRequest", "text_1"): _FILLED,
    ("ScoreRequest", "text_2"): _FILLED,
    ("RerankRequest", "documents"): _FILLED,
    ("RerankRequest", "top_n"): {"minimum": 0},
    ("DetokenizeRequest", "tokens"): {"items": {"type": "integer", "minimum": 0}},
    ("BatchRequest", "completion_window"): {"enum": ["24h"]},
    ("BatchRequest", "endpoint"): {"enum": [*ENDPOINTS]},
}


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
    _add_bounds(components)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        plain = replace(operation, path=operation.path.replace(":path", ""))  # as a reader writes it
        paths.setdefault(plain.path, {})[plain.method.lower()] = _described(plain, known)
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


def _add_bounds(components: Mapping[str, dict[str, Any]]) -> None:
    for kind, schema in components.items():
        for name, field in schema.get("properties", {}).items():
            ranged = _range(name, field) if kind.endswith("Request") else {}
            field.update(_BOUNDS.get((kind, name), ranged))


def _range(name: str, field: Mapping[str, Any]) -> dict[str, Any]:
    """The range of a sampling parameter, in JSON Schema's words; nothing for what is no number."""
    allowed = RANGES.get(_SAME.get(name, name))
    kinds = {one.get("type") for one in field.get("anyOf", [field])}
    if allowed is None or not kinds & {"integer", "number"}:
        return {}
    low = -1 if name == "top_k" else allowed.low  # -1: all, as 0
    return {"exclusiveMinimum" if allowed.above else "minimum": low, "maximum": allowed.high}
