"""Schemas, grammars and patterns that crash, hang or fill native compilers: a 400 for their sender alone."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from support.clients.attacker import Server


def chain(count: int) -> dict[str, Any]:
    """A schema of definitions that each hold the next."""
    inner = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$defs": {**inner, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def lark(count: int) -> str:
    """Rules that each use the next."""
    return "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(count)) + f'\nr{count}: "z"'


def gbnf(count: int, first: str = "") -> str:
    """The same as llama.cpp writes it; the translator takes quadratic time."""
    rules = "\n".join(f'r{i} ::= "a" r{i + 1} | "b"' for i in range(count))
    return f'root ::= {first} r0\n{rules}\nr{count} ::= "z"'


def nested(count: int) -> dict[str, Any]:
    """Arrays in arrays."""
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(count):
        schema = {"type": "array", "items": schema}
    return schema


def messages(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **body}


def prompt(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "x", "max_tokens": 2, **body}


def of_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


TAG = {"structures": [{"begin": "<a>", "schema": chain(900), "end": "</a>"}], "triggers": ["<a"]}
ATTACKS = {
    "2,000 definitions as response_format": messages(response_format=of_format(chain(2000))),
    "900 definitions as response_format": messages(response_format=of_format(chain(900))),
    "900 definitions as guided_json": prompt(guided_json=chain(900)),
    "900 definitions in Responses": ("/v1/responses", {
        "input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": chain(900)}}}),
    "900 definitions as structural tag": prompt(structural_tag=TAG),
    "1,500 rules": prompt(guided_grammar=lark(1500)),
    "1,999 rules": prompt(guided_grammar=lark(1998)),
    "4,000 rules": prompt(guided_grammar=lark(4000)),
    "1,900 rules of GBNF": prompt(guided_grammar=gbnf(1900)),
    "5,000 brackets": prompt(guided_grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "20,000 brackets of a pattern": prompt(guided_regex="(" * 20_000 + "a" + ")" * 20_000),
    "a pattern repeated by millions": prompt(guided_regex="((a{1,1000}){1,1000}){1,1000}"),
    "a million branches": prompt(guided_regex="|".join(f"a{i}" for i in range(100_000))),
    "schemas 190 deep": prompt(guided_json=nested(95)),
    "schemas 5,000 deep": prompt(guided_json=nested(300)),
    "300,000 keys": prompt(guided_json={"properties": {f"k{i}": {} for i in range(300_000 // 8)}}),
    "an array of billions": prompt(guided_json={"type": "array", "items": {}, "minItems": 10**9}),
    "a string of billions": prompt(guided_json={"type": "string", "minLength": 10**9}),
    "allOf that multiplies": prompt(guided_json={"allOf": [{"anyOf": [{"enum": [*range(50)]}] * 20}] * 20}),
    "a pattern in a schema": prompt(guided_json={"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"}),
    "a definition of itself": prompt(guided_json={"$defs": {"a": {"$ref": "#/$defs/a"}},
                                                "$ref": "#/$defs/a"}),
    "a rule of itself": prompt(guided_grammar="start: start"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_grammar_hurts_nobody_else(server: Server, name: str) -> None:
    path, body = ATTACKS[name]
    others: list[int] = []

    def neighbour() -> None:
        others.append(server.complete(max_tokens=20)[0])

    thread = threading.Thread(target=neighbour)
    thread.start()
    before = time.monotonic()
    status, answer = server.ask("POST", path, body)
    assert time.monotonic() - before < 15
    thread.join()
    assert others == [200]
    assert status in (200, 400), answer[:300]
    if status == 400:
        assert len(json.loads(answer)["error"]["message"]) < 2000


def test_clients_that_leave_take_their_work_along(server: Server) -> None:
    """Six slow grammars whose clients hang up leave the workers to everybody else."""
    socks = []
    for i in range(6):
        body = json.dumps({"prompt": "x", "max_tokens": 1, "guided_grammar": gbnf(1500, f'"{i}"')}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        socks.append(sock)
    time.sleep(0.3)
    for sock in socks:
        sock.close()
    before = time.monotonic()
    assert server.complete(prompt="word " * 1500)[0] == 200
    assert server.complete(guided_choice=["yes", "no"])[0] == 200
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("name", ["self", "messages", "range", "loop", "namespace", "class", "\0", "a b", ""])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_no_variable_of_a_template_breaks_it(server: Server, name: str, path: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    body["chat_template_kwargs"] = {name: {"x": [1]}}
    assert server.ask("POST", path, body)[0] in (200, 400)


ODD = [
    {"role": "user", "content": "a", "type": ["message"]}, {"role": ["user"], "content": "a"}, {"type": 5},
    {"type": "function_call", "call_id": ["a"], "name": ["f"], "arguments": "{}"}, {"type": {"a": 1}},
    {"type": "function_call_output", "call_id": {"a": 1}, "output": "x"}, {"id": ["x"], "role": "user"},
]  # fmt: skip


@pytest.mark.parametrize("item", ODD, ids=str)
def test_items_of_odd_types_are_refused(server: Server, item: dict[str, Any]) -> None:
    assert server.ask("POST", "/v1/responses", {"input": [item]})[0] == 400
    assert server.ask("POST", "/v1/conversations", {"items": [item]})[0] == 400
