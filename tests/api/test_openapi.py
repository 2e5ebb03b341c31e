"""The OpenAPI document: complete, consistent, and true of what the server answers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema
import msgspec
import pytest
from starlette.routing import Route

from rvllm.api.app import build_app
from rvllm.api.docs.examples import BODIES, curl
from rvllm.api.docs.openapi import document
from support.doubles.server import LiveServer

PAGE = ("/rvllm/", "/web/", "/openapi.json", "/docs")  # the page's own, and the document itself


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_route_is_described_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def keep(*given: Any) -> Any:
        built.append(build_app(*given))
        return built[-1]

    monkeypatch.setattr("support.doubles.server.build_app", keep)
    with LiveServer(drain_timeout=0.2):
        routes = {
            (method, route.path.replace(":path", ""))
            for route in built[0].routes
            if isinstance(route, Route)
            for method in (route.methods or ()) - {"HEAD"}
        }
    described = {
        (method.upper(), path) for path, methods in document()["paths"].items() for method in methods
    }
    assert described == {
        (method, path) for method, path in routes if path != "/" and not path.startswith(PAGE)
    }


def test_the_document_holds_together(server: LiveServer) -> None:
    status, headers, body = server.raw("GET", "/openapi.json")
    assert status == 200 and headers["content-type"] == "application/json"
    found = json.loads(body)
    names = set(found["components"]["schemas"])
    assert {ref.removeprefix("#/components/schemas/") for ref in references(found)} <= names
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [o for methods in found["paths"].values() for o in methods.values()]
    assert len({o["operationId"] for o in operations}) == len(operations)
    chat = found["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"] and "best_of" not in chat["properties"]
    assert chat["properties"]["messages"]["minItems"] == 1  # a conversation of one message is answered
    placed = [p for o in operations for p in o.get("parameters", []) if p["in"] == "path"]
    assert placed and all(p["required"] and p["schema"]["minLength"] == 1 for p in placed)
    prompt = found["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert (prompt["minLength"], prompt["minItems"]) == (1, 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "logprobs": 1}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/conversations", {"metadata": {"a": "b"}}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_answers_are_as_described(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    status, answer = server.post(path, **body)
    operation = document()["paths"][path]["post"]
    part = operation["responses"]["200" if status == 200 else "default"]
    schema = {**part["content"]["application/json"]["schema"], "components": document()["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer)
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**request, "components": document()["components"]}).validate(body)


def test_the_page_links_to_what_is_on_it(server: LiveServer) -> None:
    status, headers, body = server.raw("GET", "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    page = body.decode()
    HTMLParser().feed(page)
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert len(links) > 60 and links <= set(re.findall(r'id="([^"]+)"', page))
    assert "/v1/chat/completions" in page and "<script" not in page


def test_the_document_needs_no_key_and_tells_of_one(server: LiveServer) -> None:
    assert "security" not in json.loads(server.raw("GET", "/openapi.json")[2])
    with LiveServer(api_key="secret", drain_timeout=0.2) as keyed:
        status, _, body = keyed.raw("GET", "/openapi.json")
        assert status == keyed.raw("GET", "/docs")[0] == 200
        assert json.loads(body)["security"] == [{"bearer": []}, {"header": []}]
        assert keyed.raw("GET", "/v1/files")[0] == 401
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert keyed.raw("GET", "/v1/files", headers=headers)[0] == 200


def test_errors_are_as_described(server: LiveServer) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        status, answer = server.post(path, messages=3)
        part = document()["paths"][path]["post"]["responses"]["default"]
        schema = {**part["content"]["application/json"]["schema"], "components": document()["components"]}
        assert status == 400
        jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_ranges_are_those_of_the_server(server: LiveServer, path: str) -> None:
    base: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    base |= {"prompt": "a"} if path == "/v1/completions" else {}
    if path == "/v1/responses":
        base = {"model": "tiny", "max_output_tokens": 1, "input": "a"}
    schema = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    ranged = {name: field for name, field in fields.items() if "maximum" in field}
    assert len(ranged) >= 4 and "temperature" in ranged
    for name, field in ranged.items():
        low = field.get("minimum", field.get("exclusiveMinimum"))
        outside = low if "exclusiveMinimum" in field else low - 1
        body = {**base, name: outside, "echo": True} if path == "/v1/completions" else {**base, name: outside}
        status, answer = server.post(path, **body)
        assert status == 400, (name, outside, answer)
        if low == 0 and name != "max_tokens" and "exclusiveMinimum" not in field:
            more = {"logprobs": True} if name == "top_logprobs" and path != "/v1/responses" else {}
            status, answer = server.post(path, **{**base, name: low, **more})
            assert status == 200, (name, low, answer)


def test_events_are_as_described(server: LiveServer) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 1}),
    ):
        content = document()["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        data = content["schema"]["properties"]["data"]["contentSchema"]
        validator = jsonschema.Draft202012Validator({**data, "components": document()["components"]})
        events = server.events(path, **body)
        assert len(events) > 2
        for event in events:
            validator.validate(event)


def test_a_wrong_method_is_told_the_right_ones(server: LiveServer) -> None:
    for path, methods in (("/v1/batches", "GET, HEAD, POST"), ("/v1/files/x", "DELETE, GET, HEAD")):
        status, headers, _ = server.raw("PATCH", path)
        assert (status, headers["allow"]) == (405, methods)


def test_a_query_is_checked_also_where_it_changes_nothing(server: LiveServer) -> None:
    _, made = server.post("/v1/responses", input="a", max_output_tokens=1)
    for query in ("starting_after=-1", "starting_after=", "stream=null", "stream="):
        status, _, answer = server.raw("GET", f"/v1/responses/{made['id']}?{query}")
        assert (status, json.loads(answer)["error"]["param"]) == (400, query.partition("=")[0])
    for query in ("order=", "limit=", "limit=0"):
        status, _, answer = server.raw("GET", f"/v1/files?{query}")
        assert (status, json.loads(answer)["error"]["param"]) == (400, query.partition("=")[0])


def test_every_endpoint_has_a_command_that_is_answered() -> None:
    """The commands of `/docs`, but for names of things that have to be made first."""
    of_encoders = re.compile(r"/(v1/)?embeddings|/(v[12]/)?(score|rerank)|/pooling")
    classes = LiveServer(drain_timeout=0.2, embedding_size=2, labels=["no", "yes"])
    encoders = LiveServer(drain_timeout=0.2, embedding_size=16)
    with LiveServer(drain_timeout=0.2) as text, encoders as encoder, classes as classifier:
        text.service.ready = msgspec.structs.replace(text.service.ready, sleep_mode=True)
        for path, methods in document()["paths"].items():
            for method, operation in methods.items():
                server = encoder if of_encoders.fullmatch(path) else text
                server = classifier if path == "/classify" else server
                command = curl(method.upper(), path, operation, server.url, "tiny")
                if "ID" in command or "-F" in command:
                    continue
                said = subprocess.run(
                    ["bash", "-c", f"{command} -sS -o /dev/null -w '%{{http_code}}'"],
                    capture_output=True, text=True, check=True, timeout=20,
                )  # fmt: skip
                assert said.stdout == "200", command


def test_every_body_that_is_taken_has_an_example() -> None:
    taken = {path for path, methods in document()["paths"].items() for operation in methods.values()
             if "application/json" in operation.get("requestBody", {}).get("content", {})}  # fmt: skip
    assert taken == set(BODIES)


def test_commands_are_those_of_the_reader() -> None:
    with LiveServer(api_key="secret", drain_timeout=0.2) as live:
        _, headers, body = live.raw("GET", "/docs")
        html = body.decode()
    assert f"curl {live.url}/v1/models" in html and "Bearer $RVLLM_API_KEY" in html
    assert "secret" not in html and "style-src 'self'" in headers["content-security-policy"]
