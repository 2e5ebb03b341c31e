"""A command for each operation that a reader can paste: `curl` with a body that is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from shlex import quote
from typing import Any

_SAID = [{"role": "user", "content": "What is the capital of France?"}]
_ITEM = {"type": "message", "role": "user", "content": "What is the capital of France?"}
_DOCUMENTS = ["Paris is the capital of France.", "Bread is made of flour and water."]
_RERANK = {"query": "What is the capital of France?", "documents": _DOCUMENTS}
_SCORE = {"queries": "What is the capital of France?", "documents": _DOCUMENTS}

BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _SAID, "max_tokens": 32},
    "/v1/chat/completions/batch": {"messages": [_SAID, _SAID], "max_tokens": 32},
    "/v1/chat/completions/render": {"messages": _SAID},
    "/v1/completions": {"prompt": "The capital of France is", "max_tokens": 8},
    "/v1/completions/render": {"prompt": "The capital of France is"},
    "/generate": {"prompt": "The capital of France is", "max_tokens": 8},
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 8}},
    "/v1/messages": {"messages": _SAID, "max_tokens": 32},
    "/v1/messages/count_tokens": {"messages": _SAID},
    "/v1/responses": {"input": "What is the capital of France?", "max_output_tokens": 32},
    "/v1/conversations": {"metadata": {"topic": "capitals"}},
    "/v1/conversations/{id}": {"metadata": {"topic": "rivers"}},
    "/v1/conversations/{id}/items": {"items": [_ITEM]},
    "/v1/batches": {
        "input_file_id": "file-ID",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
    "/v1/embeddings": {"input": _DOCUMENTS},
    "/pooling": {"input": _DOCUMENTS},
    "/classify": {"input": _DOCUMENTS},
    "/v1/score": _SCORE,
    "/score": _SCORE,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/rerank": _RERANK,
    "/tokenize": {"prompt": "The capital of France is"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""Bodies by path; the model's name is added where it is taken."""

_NAMED = ("/v1/chat", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings")


def body_of(path: str, model: str) -> dict[str, Any] | None:
    """A body that `path` takes, None where it takes none."""
    body = BODIES.get(path)
    if body is None or not path.startswith(_NAMED):
        return body
    return {"model": model, **body}


def curl(
    method: str, path: str, operation: Mapping[str, Any], origin: str, model: str, *, keyed: bool = False
) -> str:
    """The command for an operation of the OpenAPI document, in lines of a readable length.

    keyed: the server asks for a key.
    """
    named = path.replace("{name}", model)
    url = origin + re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), named)
    lines = [f"curl {quote(url)}"]
    content = operation.get("requestBody", {}).get("content", {})
    body = body_of(path, model) if "application/json" in content else None
    if method not in ("GET", "POST") or (method == "POST" and not content):
        lines[0] = f"curl -X {method} {quote(url)}"
    if keyed and operation.get("security") != []:
        lines.append('-H "Authorization: Bearer $RVLLM_API_KEY"')
    if "multipart/form-data" in content:
        lines.append("-F purpose=batch -F file=@requests.jsonl")
    if body is not None:
        lines += ["-H 'Content-Type: application/json'", f"-d {quote(json.dumps(body))}"]
    return " \\\n  ".join(lines)
