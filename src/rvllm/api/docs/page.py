"""`/docs`: the OpenAPI document as a page to read, in the style of the page at `/`; no scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from html import escape
from typing import Any

from rvllm.api.http.exchange import Exchange

_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; "
     b"form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)  # fmt: skip
_HOST = re.compile(rb"[\w.:\[\]-]{1,255}")
_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>API · rvLLM</title>
<link rel="icon" href="/web/icon.svg" type="image/svg+xml"><link rel="stylesheet" href="/web/style.css">
<link rel="stylesheet" href="/web/docs.css"></head><body class="docs">
<header><a class="brand" href="/">
<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M3 5h18M3 12h12M3 19h7"/></svg>rvLLM</a>
<span class="model">API</span><a href="/">Chat and engine</a><a href="/openapi.json">openapi.json</a></header>
<main>"""


async def openapi(keyed: bool, exchange: Exchange, body: bytes) -> None:
    """`/openapi.json`. keyed: whether the server asks for a key."""
    from rvllm.api.docs.openapi import document  # not needed for the start

    await exchange.json(document(keyed))


async def docs(model: str, keyed: bool, exchange: Exchange, body: bytes) -> None:
    """`/docs`. model: the name that the examples give."""
    host = exchange.header(b"host") or b""
    origin = f"http://{host.decode()}" if _HOST.fullmatch(host) else "http://127.0.0.1:8000"
    html = page(model, origin, keyed)
    await exchange.respond(html, b"text/html; charset=utf-8", headers=_HEADERS)


@lru_cache(maxsize=4)  # a server has few names
def page(model: str, origin: str, keyed: bool) -> bytes:
    """The page. origin: where the reader found the server."""
    from rvllm.api.docs.openapi import document

    known = document(keyed)
    parts = [_HEAD, *_contents(known), *_endpoints(known, model, origin, keyed), *_schemas(known)]
    return "\n".join([*parts, "</main></body></html>"]).encode()


def _contents(known: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h1>rvLLM {escape(known['info']['version'])}</h1><nav aria-label='Endpoints'>"
    for path, method, operation in _operations(known):
        yield f'<a href="#{operation["operationId"]}"><b>{method}</b> <code>{escape(path)}</code></a>'
    yield "</nav>"


def _endpoints(known: Mapping[str, Any], model: str, origin: str, keyed: bool) -> Iterator[str]:
    from rvllm.api.docs.examples import curl

    for path, method, operation in _operations(known):
        yield f'<section id="{operation["operationId"]}">'
        yield f"<h2><b>{method}</b> <code>{escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
        command = curl(method, path, operation, origin, model, keyed=keyed)
        yield f"<pre tabindex='0'><code>{escape(command)}</code></pre><div class='scroll'><table>"
        for parameter in operation["parameters"]:
            kind = _kind(parameter["schema"])
            yield f"<tr><td><code>{parameter['name']}</code></td><td>{parameter['in']}, {kind}</td></tr>"
        for content, body in operation.get("requestBody", {}).get("content", {}).items():
            yield f"<tr><td>takes</td><td>{escape(content)}: {_kind(body['schema'])}</td></tr>"
        for content, body in operation["responses"]["200"]["content"].items():
            yield f"<tr><td>gives</td><td>{escape(content)}: {_kind(body['schema'])}</td></tr>"
        yield "</table></div></section>"


def _schemas(known: Mapping[str, Any]) -> Iterator[str]:
    yield "<h1>What they take and give</h1>"
    for name, schema in sorted(known["components"]["schemas"].items()):
        yield f'<section id="s-{escape(name)}"><h3><code>{escape(name)}</code></h3>'
        yield f"<p>{escape(schema.get('description', '')).replace(chr(10), '<br>')}</p>"
        yield "<div class='scroll'><table>"
        required = schema.get("required", ())
        for field, kind in schema.get("properties", {}).items():
            mark = " <i>required</i>" if field in required else ""
            yield f"<tr><td><code>{escape(field)}</code>{mark}</td><td>{_kind(kind)}</td></tr>"
        yield "</table></div></section>"


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
