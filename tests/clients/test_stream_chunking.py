"""Streams parse however the network cuts them: between any two bytes, inside characters and line ends too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.doubles.server import LiveServer

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endfor %}"
)
CALL = 'Ja. <tool_call>\n{"name": "wetter", "arguments": {"city": "Zürich 😀 日本"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "wetter", "parameters": {"type": "object"}}}
PARAMETERS = TOOL["function"]["parameters"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 200},
    "/v1/completions": {"model": "tiny", "prompt": "hello", "logprobs": 1, "max_tokens": 200},
    "/v1/responses": {
        "model": "tiny", "input": "hello", "max_output_tokens": 200,
        "tools": [{"type": "function", "name": "wetter", "parameters": PARAMETERS}],
    },
    "/v1/messages": {
        "model": "tiny", "messages": HELLO, "max_tokens": 200,
        "tools": [{"name": "wetter", "input_schema": PARAMETERS}],
    },
}  # fmt: skip
ASKING = {
    "/v1/chat/completions": "chat.completions",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}


def http_of(client: object) -> ModuleType:
    """The HTTP library below a client: httpx, or its successor."""
    roots = [cls.__module__.partition(".")[0] for cls in type(client._client).__mro__]  # type: ignore[attr-defined]
    return import_module(next(root for root in roots if root.startswith("httpx")))


class Replay:
    """One recorded stream, and the client it is for: what the client makes of the stream, cut up somehow."""

    def __init__(self, path: str, recorded: bytes) -> None:
        self.path, self.recorded = path, recorded
        self._pieces: list[bytes] = []
        kind: Any = anthropic.Anthropic if path == "/v1/messages" else openai.OpenAI
        given = {"base_url": "http://x", "api_key": "k", "max_retries": 0}
        http = http_of(kind(**given))
        replay = self

        class Body(http.SyncByteStream):  # type: ignore[name-defined,misc]
            def __iter__(self) -> Iterator[bytes]:
                yield from replay._pieces

        def answer(request: object) -> object:
            return http.Response(200, headers={"content-type": "text/event-stream"}, stream=Body())

        self._client = kind(**given, http_client=http.Client(transport=http.MockTransport(answer)))

    def parsed(self, cuts: Iterable[int]) -> list[Any]:
        """The events that the client sees when the stream is cut at these places."""
        places = [0, *sorted(cuts), len(self.recorded)]
        self._pieces = [self.recorded[a:b] for a, b in pairwise(places)]
        found = self._client
        for name in ASKING[self.path].split("."):
            found = getattr(found, name)
        return [event.to_dict() for event in found.create(**BODIES[self.path], stream=True)]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(template=TEMPLATE, drain_timeout=0.2) as live:
        eos = live.tokenizer.eos_token_id
        live.engine.answer = [*live.tokenizer.encode(CALL, add_special_tokens=False), eos or 0]
        yield live


@pytest.fixture(scope="module", params=BODIES)
def replay(server: LiveServer, request: pytest.FixtureRequest) -> Replay:
    status, _, recorded = server.raw(
        "POST", request.param, json.dumps({**BODIES[request.param], "stream": True}).encode()
    )
    assert status == 200, recorded
    return Replay(request.param, recorded)


def test_the_stream_says_what_it_should(replay: Replay) -> None:
    whole = replay.parsed([])
    text = json.dumps(whole, ensure_ascii=False)
    assert len(whole) > 8 and "😀" in text
    assert replay.path == "/v1/completions" or "wetter" in text


def test_cut_at_every_byte(replay: Replay) -> None:
    whole = replay.parsed([])
    assert replay.parsed(range(1, len(replay.recorded))) == whole


def test_cut_once_anywhere(replay: Replay) -> None:
    whole, count = replay.parsed([]), len(replay.recorded)
    inside_characters = [i for i in range(1, count) if replay.recorded[i] & 0xC0 == 0x80]
    line_ends = [i for i in range(1, count) if replay.recorded[i - 1] in b"\r\n"]
    for place in {
        *inside_characters[:40],
        *line_ends[:20],
        *line_ends[-20:],
        *range(1, count, 1 + count // 40),
    }:
        assert replay.parsed([place]) == whole, place


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_cut_anywhere(replay: Replay, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(replay.recorded)), max_size=40))
    assert replay.parsed(cuts) == replay.parsed([])
