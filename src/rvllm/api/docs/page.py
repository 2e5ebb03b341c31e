"""`/docs`: the OpenAPI document as a page to read; plain HTML, no scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from typing import Any

from rvllm.api.http.exchange import Exchange

_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
     b"form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, .method { font-family: ui-monospace, monospace } .method { font-weight: bold; margin-right: .5rem }
section { border-top: 1px solid #8884; padding: .5rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td { border-top: 1px solid #8884; padding: .25rem .5rem; vertical-align: top } td:first-child { width: 16rem }
nav { columns: 2 } h2, h3 { overflow-wrap: anywhere } a { color: LinkText }
@media (max-width: 40rem) { nav { columns: 1 } td:first-child { width: auto } }
"""


async def openapi(keyed: bool, exchange: Exchange, body: bytes) -> None:
    """`/openapi.json`. keyed: whether the server asks for a key."""
    from rvllm.api.docs.openapi import document  # not needed for the start

    await exchange.json(document(keyed))


async def docs(exchange: Exchange, body: bytes) -> None:
    """`/docs`."""
    await exchange.respond(page(), b"text/html; charset=utf-8", headers=_HEADERS)


@cache
def page() -> bytes:
    """The page."""
    from rvllm.api.docs.openapi import document

    return "\n".join(_lines(document())).encode()


def _lines(known: Mapping[str, Any]) -> Iterator[str]:
    version = escape(known["info"]["version"])
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>rvLLM API</title><style>{_STYLE}</style></head><body>"
    yield f'<h1>rvLLM {version}</h1><p>For programs: <a href="/openapi.json">/openapi.json</a></p><nav>'
    for path, method, operation in _operations(known):
        yield f'<div><a href="#{operation["operationId"]}"><code>{method} {escape(path)}</code></a></div>'
    yield "</nav>"
    for path, method, operation in _operations(known):
        yield f'<section id="{operation["operationId"]}">'
        yield f'<h2><span class="method">{method}</span><code>{escape(path)}</code></h2>'
        yield f"<p>{escape(operation['summary'])}</p><table>"
        for parameter in operation["parameters"]:
            kind = _kind(parameter["schema"])
            yield f"<tr><td><code>{parameter['name']}</code></td><td>{parameter['in']}, {kind}</td></tr>"
        for content, body in operation.get("requestBody", {}).get("content", {}).items():
            yield f"<tr><td>takes {escape(content)}</td><td>{_kind(body['schema'])}</td></tr>"
        for content, body in operation["responses"]["200"]["content"].items():
            yield f"<tr><td>gives {escape(content)}</td><td>{_kind(body['schema'])}</td></tr>"
        yield "</table></section>"
    for name, schema in sorted(known["components"]["schemas"].items()):
        yield f'<section id="s-{escape(name)}"><h3><code>{escape(name)}</code></h3>'
        yield f"<p>{escape(schema.get('description', '')).replace(chr(10), '<br>')}</p><table>"
        required = schema.get("required", ())
        for field, kind in schema.get("properties", {}).items():
            mark = " (required)" if field in required else ""
            yield f"<tr><td><code>{escape(field)}</code>{mark}</td><td>{_kind(kind)}</td></tr>"
        yield "</table></section>"
    yield "</body></html>"


def _operations(known: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in known["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, with links."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#s-{name}"><code>{name}</code></a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items') or {})}"
    return escape(str(schema.get("type", "anything")))
