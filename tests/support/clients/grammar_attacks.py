"""Schemas, grammars and patterns that crash, hang or fill native compilers."""

from __future__ import annotations

from typing import Any


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
