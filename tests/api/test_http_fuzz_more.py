"""Whatever the other surfaces are sent, the answer is a success or a 4xx that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvllm.api.docs.openapi import OPERATIONS
from support.doubles.server import LiveServer

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 5, 2**31, 2**63, 2**64, 10**40, 0.5, 1e300, -1e300]),
    st.text(max_size=8),
    st.sampled_from(["auto", "none", "user", "assistant", "text", "json_schema", "function", "message"]),
)
KEYS = st.one_of(
    st.sampled_from(
        ["type", "role", "content", "text", "id", "name", "input", "format", "schema", "call_id"]
    ),
    st.text(max_size=6),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)
HELLO = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "tiny", "max_tokens": 2, "messages": HELLO},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": HELLO},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/conversations": {"items": HELLO},
    "/v1/batches": {"input_file_id": "a", "endpoint": "/v1/responses", "completion_window": "24h"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
}
FIELDS = {operation.path: operation.request for operation in OPERATIONS if operation.request is not None}


def check_answer(status: int, answer: bytes, sent: object) -> None:
    assert 200 <= status < 500, (sent, answer)
    if status >= 400:
        error = json.loads(answer)["error"]
        assert error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize("path", BASES)
def test_random_fields(server: LiveServer, path: str) -> None:
    kind = FIELDS[path]

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(kind.__struct_fields__), VALUES, min_size=1, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        body = {**BASES[path], **fields}
        status, _, answer = server.raw("POST", path, json.dumps(body, allow_nan=False).encode())
        check_answer(status, answer, body)

    check()
    assert server.chat(max_tokens=1)[0] == 200


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operation=st.sampled_from([o for o in OPERATIONS if o.method != "POST" and not o.open]),
    name=st.from_regex(r"[!-~]{1,12}", fullmatch=True),
    query=st.dictionaries(st.sampled_from(["after", "limit", "order", "stream", "starting_after", "purpose"]),
                          st.from_regex(r"[!-~]{0,8}", fullmatch=True), max_size=3),
)  # fmt: skip
def test_random_paths(server: LiveServer, operation: Any, name: str, query: dict[str, str]) -> None:
    from urllib.parse import quote, urlencode

    path = operation.path
    for part in ("{id}", "{item}", "{name}"):
        path = path.replace(part, quote(name, safe=""))
    status, _, answer = server.raw(operation.method, f"{path}?{urlencode(query)}")
    check_answer(status, answer, path)
