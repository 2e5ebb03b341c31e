"""`/openapi.json`: what the server takes and gives, made from the structs that check and write it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec

from rvllm.api.batches.files import MAX_SECONDS, MIN_SECONDS
from rvllm.api.docs.bounds import add_bounds
from rvllm.api.operations import OPERATIONS, Operation
from rvllm.api.schemas.requests import ChatRequest, CompletionRequest, Refused
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
