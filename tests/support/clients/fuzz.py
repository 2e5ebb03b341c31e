# ruff: noqa: E501
"""Fuzzers: `python scripts/fuzz.py KIND [--cases 10000] [--seed 0]`; a short run of each is a test.

Each takes valid input apart and puts it together wrongly, from a seed. Whatever comes must be answered, or
refused by rule: no crash, no hang, no error that is ours, and memory stays flat. (GGUF and safetensors files
have theirs in tests/weights/test_fuzz.py.)
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11

from rvllm.api.http.errors import ApiError
from rvllm.api.http.multipart import Form
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import LimitError, ModelError, UsageError
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.worker import tasks
from rvllm.text.worker.pool import WorkerPool
from support.clients.attacker import model
from support.doubles.server import LiveServer

BODY = b'{"prompt":"a","max_tokens":1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUESTS = [
    POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
]
PIECES = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"-", b"+", b"\xff", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Host: x\r\n", b"chunked, ",
    b"Connection: close\r\n", b"Connection: keep-alive, Upgrade\r\n", b"Upgrade: websocket\r\n", b"0\r\n\r\n",
    b"ffffffffffffffff\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.1", b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 5000,
]  # fmt: skip
LAST = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BY_RULE = {200, 400, 403, 404, 405, 408, 413, 415, 429, 431}


def mutated(rng: random.Random, data: bytes, pieces: list[bytes]) -> bytes:
    """The bytes with a few pieces put in, taken out, doubled or changed."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(5)
        if kind == 0:
            found[at:at] = rng.choice(pieces)
        elif kind == 1:
            del found[at : at + rng.randint(1, 12)]
        elif kind == 2:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:
            found[at:at] = found[at : at + rng.randint(1, 60)]
        else:
            del found[at:]
        if not found:
            break
    return bytes(found)


def requests_of(data: bytes) -> int:
    """How many requests h11, a strict reader, finds in the bytes: whole ones, and heads of a GET without a body's
    end, which may be answered as soon as the head is there."""
    connection, count = h11.Connection(h11.SERVER), 0
    connection.receive_data(data)
    connection.receive_data(b"")
    early = False  # the head of a GET has come, its end has not
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                early = event.method == b"GET"
            elif isinstance(event, h11.EndOfMessage):
                count, early = count + 1, False
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is h11.MUST_CLOSE:
                    return count
                connection.start_next_cycle()
            elif event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return count + early
    except h11.ProtocolError:
        return count + early


def fuzz_http(rng: random.Random, cases: int) -> Counter[str]:
    """Framing: no more answers with a 200 than h11 sees requests, nothing unanswered for long, no 5xx."""
    seen: Counter[str] = Counter()
    with LiveServer(drain_timeout=0.2, header_timeout=2.0, body_timeout=2.0) as server:
        for _ in range(cases):
            sent = b"".join(rng.choices(REQUESTS, k=rng.randint(1, 3)))
            whole = rng.random() < 0.2  # as they are: each must be answered with a 200
            data = sent + LAST if whole else mutated(rng, sent, PIECES)
            with socket.create_connection(("127.0.0.1", server.port), timeout=8) as sock:
                answer = b""
                try:
                    sock.sendall(data)
                    if not whole:
                        sock.shutdown(socket.SHUT_WR)
                    while chunk := sock.recv(65536):
                        answer += chunk
                except (ConnectionResetError, BrokenPipeError):
                    pass
            found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", answer)]
            found = [status for status in found if status != 100]
            assert set(found) <= BY_RULE, (data, answer)
            good = sum(status == 200 for status in found)
            asked = requests_of(data)
            assert good <= asked, ("more requests than h11 sees", data, answer)
            assert good == asked or not whole, ("a good request without an answer", data, answer)
            seen.update(map(str, found or ["none"]))
        assert server.raw("GET", "/version")[0] == 200
    return seen


def any_schema(rng: random.Random, depth: int) -> Any:
    """A schema of whatever keywords, right and wrong."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([True, False, {}, {"type": "string"}, {"type": "null"}, {"$ref": "#"}, {"const": 1},
                           {"$ref": "#/$defs/a"}, {"enum": []}, {"enum": [None, 1, "a"]}, 5, None])  # fmt: skip
    inner = lambda: any_schema(rng, depth - 1)  # noqa: E731
    number = lambda: rng.choice([0, 1, 3, -1, 2**31, 10**30, 1.5])  # noqa: E731
    makers: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "object", "properties": {rng.choice("abc"): inner() for _ in range(3)}},
        lambda: {"required": [rng.choice("abcd")], "additionalProperties": inner()},
        lambda: {"type": "array", "items": inner(), "minItems": number(), "maxItems": number()},
        lambda: {"prefixItems": [inner(), inner()], "items": inner()},
        lambda: {rng.choice(["anyOf", "allOf", "oneOf"]): [inner() for _ in range(rng.randint(0, 3))]},
        lambda: {"not": inner()},
        lambda: {
            "type": "string",
            "pattern": rng.choice(["a+", "(", "(a|b)*c", "^x{1,99}$", "\\p{L}", "(?=a)"]),
        },
        lambda: {"type": "string", "minLength": number(), "maxLength": number()},
        lambda: {"type": "number", "minimum": number(), "maximum": number(), "multipleOf": number()},
        lambda: {"$defs": {"a": inner()}, "$ref": "#/$defs/a"},
        lambda: {
            "type": rng.choice(["string", "any", 5, ["null", "integer"]]),
            "format": rng.choice(["date", "x"]),
        },
        lambda: {"patternProperties": {rng.choice(["a", "(", ".*"]): inner()}},
        lambda: {"if": inner(), "then": inner()},
    ]
    return {k: v for _ in range(rng.randint(1, 2)) for k, v in rng.choice(makers)().items()}


GRAMMARS = [
    b'start: a b\na: "x" | /[a-z]+/\nb: (a ","){1,3} c?\nc: %json {"type": "object"}\n',
    b'root ::= item ("," item)* ws\nitem ::= [a-z]+ | "\\"" [^"]* "\\""\nws ::= [ \\t\\n]*\n',
    b'start: A B*\nA: "a" B\nB: /b|c/ & ~/c/\n%ignore / /\n',
]
SOUP = [b"(", b")", b"|", b"*", b"+", b"?", b"{1,9}", b"{9999}", b"[", b"]", b'"', b"/", b"\\", b"\n", b":", b"::=",
        b"start", b"root", b"%json {}", b"@a", b"<[3]>", b"&", b"~", b"a", b"\xc3\xa9"]  # fmt: skip


def any_form(rng: random.Random) -> dict[str, Any]:
    """Something that asks for a form."""
    kind = rng.randrange(4)
    if kind == 0:
        return {"json": any_schema(rng, rng.randint(1, 5))}
    if kind == 1:
        return {"regex": mutated(rng, b"([a-z]+|\\d{2,4})*(?:x|y)?", SOUP).decode("utf-8", "replace")}
    if kind == 2:
        return {"grammar": mutated(rng, rng.choice(GRAMMARS), SOUP).decode("utf-8", "replace")}
    tag = {"begin": "<a>", "schema": any_schema(rng, 2), "end": rng.choice(["</a>", "", 5])}
    return {"structural_tag": {"triggers": [rng.choice(["<a", "", "b"])], "structures": [tag]}}


def in_workers(rng: random.Random, cases: int, ask: Callable[[WorkerPool], Any]) -> Counter[str]:
    """Runs `ask` so often, a few at once; only refusals may be raised, and a worker is always to be had."""
    seen: Counter[str] = Counter()

    async def one(pool: WorkerPool) -> None:
        try:
            await ask(pool)
            seen["done"] += 1
        except LimitError:
            seen["limit"] += 1
        except UsageError:
            seen["refused"] += 1

    async def run() -> None:
        pool = WorkerPool(str(model()), count=2, seconds=2.0, memory=512 << 20)
        pool.start()
        for first in range(0, cases, 8):
            await asyncio.gather(*(one(pool) for _ in range(min(8, cases - first))))
        pool.close()

    asyncio.run(run())
    return seen


def fuzz_schemas(rng: random.Random, cases: int) -> Counter[str]:
    """Schemas, patterns, grammars and tags, through the workers as a server has them."""

    async def ask(pool: WorkerPool) -> None:
        form = StructuredOutputsParams(**any_form(rng))
        await pool.run(tasks.answer_grammar, "guided", 10, form, None, None)

    return in_workers(rng, cases, ask)


TEMPLATES = [
    b"{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
    b"{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
    b"{% macro f(a, b=2) %}{{ a * b }}{% endmacro %}{{ f('x') }}{{ messages | tojson(indent=2) }}",
]
JINJA = [b"{{", b"}}", b"{%", b"%}", b"messages", b".content", b"[0]", b"[-1]", b"|", b" ~ ", b" * 999", b" ** ", b"9" * 9,
         b"for a in range(9999)", b"endfor", b"if", b"else", b"(", b")", b"'", b"namespace(", b"__class__", b".split()",
         b"raise_exception('x')", b"self", b"loop", b"tojson", b"macro f()", b"set x ="]  # fmt: skip


def fuzz_templates(rng: random.Random, cases: int) -> Counter[str]:
    """Chat templates."""
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]

    async def ask(pool: WorkerPool) -> None:
        template = mutated(rng, rng.choice(TEMPLATES), JINJA).decode("utf-8", "replace")
        options = {"tools": None, "add_generation_prompt": True}
        await pool.run(Tokenizer.render, "messages", 10, template, messages, options, {"a": 1})

    return in_workers(rng, cases, ask)


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: x/y\r\n\r\n{}\r\n--b--\r\n'
)
OF_FORMS = [
    b"--b",
    b"--b--",
    b"\r\n",
    b"\n",
    b'"',
    b"\\",
    b";",
    b"name=",
    b'filename="../../x"',
    b"\0",
    b"\xff",
]


class Forgotten:
    """What becomes of a form's file."""

    def write(self, data: bytes) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""


def fuzz_multipart(rng: random.Random, cases: int) -> Counter[str]:
    """Forms with files."""
    seen: Counter[str] = Counter()
    kinds = [b"multipart/form-data; boundary=b", b'multipart/form-data; boundary="b"', b"multipart/form-data"]
    for _ in range(cases):
        kind = rng.choice(kinds) if rng.random() < 0.8 else mutated(rng, kinds[0], OF_FORMS)
        data, step = mutated(rng, FORM, OF_FORMS), rng.choice([1, 5, 1000])
        try:
            form = Form(kind, Forgotten)
            for at in range(0, len(data), step):
                form.feed(data[at : at + step])
            form.finish()
            assert "/" not in form.filename
            seen["done"] += 1
        except ApiError as error:
            assert error.status in (400, 415)
            seen["refused"] += 1
    return seen


def fuzz_tokenizers(rng: random.Random, cases: int) -> Counter[str]:
    """tokenizer.json with values taken from elsewhere in it, left out or of another type."""
    seen: Counter[str] = Counter()
    source = json.loads((model() / "tokenizer.json").read_text())
    folder = Path(tempfile.mkdtemp(prefix="hostile-tokenizer-"))
    config = {"chat_template": "x", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for _ in range(cases):
        damaged = json.loads(json.dumps(source))
        for _ in range(rng.randint(1, 3)):
            damage(rng, damaged)
        (folder / "tokenizer.json").write_text(json.dumps(damaged))
        try:
            tokenizer = Tokenizer.load(folder)
            tokenizer.decode(tokenizer.encode("hello wörld 123"))
            seen["done"] += 1
        except (ModelError, UsageError):
            seen["refused"] += 1
        except BaseException as error:  # a panic while encoding; a worker's end, in a server
            assert type(error).__name__ == "PanicException", error
            seen["panic"] += 1
    return seen


def damage(rng: random.Random, value: Any) -> None:
    """Changes one place of a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = rng.choice(list(keys)[:50])
        inner = value[key]
        if not isinstance(inner, dict | list) or rng.random() < 0.3:
            kind = rng.randrange(3)
            if kind == 0 and isinstance(value, dict):
                del value[key]
            else:
                value[key] = rng.choice([None, -1, 2**40, "", "x", [], {}, True, 1.5, "\ud800"[:0]])
            return
        value = inner


KINDS = {
    "http": fuzz_http,
    "schemas": fuzz_schemas,
    "templates": fuzz_templates,
    "multipart": fuzz_multipart,
    "tokenizers": fuzz_tokenizers,
}
