"""The official `anthropic` client against the HTTP side, and the parts of the protocol it does not show."""

from __future__ import annotations

import json

import anthropic
import pytest
from anthropic.types import MessageParam

from support.doubles.server import ANSWER, CONTEXT, LiveServer

HELLO: list[MessageParam] = [{"role": "user", "content": "hello"}]


def test_a_message(claude: anthropic.Anthropic, server: LiveServer) -> None:
    answer = claude.messages.create(
        model="tiny",
        max_tokens=6,
        messages=HELLO,
        system="Be brief.",
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7},
    )
    assert answer.content[0].type == "text"
    assert answer.content[0].text == server.tokenizer.decode(server.engine.answer[:6])
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("max_tokens", None, "assistant")
    request = server.engine.requests[-1]
    assert answer.usage.output_tokens == 6
    assert answer.usage.cache_read_input_tokens == 4
    assert answer.usage.input_tokens == len(request.prompt_token_ids) - 4
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert "Be brief." in server.tokenizer.decode(request.prompt_token_ids)


def test_a_stop_sequence(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tiny", max_tokens=200, messages=HELLO, stop_sequences=[" hello"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " hello")
    assert answer.content[0].type == "text"
    assert answer.content[0].text == ANSWER.partition(" hello")[0]


def test_a_full_context_has_its_own_reason(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tiny", max_tokens=CONTEXT * 2, messages=HELLO)
    assert answer.stop_reason == "model_context_window_exceeded"


def test_the_clients_stream_accumulator(claude: anthropic.Anthropic, server: LiveServer) -> None:
    count = len(server.engine.answer)
    with claude.messages.stream(model="tiny", max_tokens=count, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert final.content[0].type == "text" and final.content[0].text == ANSWER
    assert final.usage.output_tokens == count and final.stop_reason == "max_tokens"
    assert final.usage.input_tokens == len(server.engine.requests[-1].prompt_token_ids) - 4


def test_events_come_in_order_with_their_names(server: LiveServer) -> None:
    body = {"model": "tiny", "max_tokens": 5, "messages": HELLO, "stream": True}
    status, headers, raw = server.raw("POST", "/v1/messages", json.dumps(body).encode())
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in raw.decode().strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert names == [entry["type"] for entry in data]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert {entry["index"] for entry in data if entry["type"].startswith("content_block")} == {0}
    assert data[0]["message"]["content"] == [] and data[0]["message"]["usage"]["output_tokens"] == 0
    assert data[2]["content_block"] == {"type": "text", "text": ""}


def test_tool_results_and_neighbours_become_chat_messages(server: LiveServer) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {"ttl": "5m"}}]},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "well", "signature": "x"},
            {"type": "text", "text": "calling"},
            {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "seven"}]},
            {"type": "text", "text": "so?"}]},
    ]  # fmt: skip
    status, answer = server.post("/v1/messages", model="tiny", max_tokens=1, messages=turns, tools=[
        {"name": "add", "description": "adds", "input_schema": {"type": "object"}}])  # fmt: skip
    assert status == 200, answer
    prompt = server.last_prompt()
    places = [prompt.index(word) for word in ("one", "two", "calling", "seven", "so?")]
    assert places == sorted(places)
    assert prompt.count("<|im_start|>user") == 2 and prompt.count("<|im_start|>tool") == 1


def test_a_final_assistant_turn_is_continued(claude: anthropic.Anthropic, server: LiveServer) -> None:
    turns: list[MessageParam] = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    claude.messages.create(model="tiny", max_tokens=1, messages=turns)
    prompt = server.last_prompt()
    assert prompt.endswith("The answer is")


def test_count_tokens(claude: anthropic.Anthropic, server: LiveServer) -> None:
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    claude.messages.create(model="tiny", max_tokens=1, messages=HELLO, system="Be brief.")
    assert counted.input_tokens == len(server.engine.requests[-1].prompt_token_ids)


def test_errors_are_the_clients_exceptions(claude: anthropic.Anthropic, server: LiveServer) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="other", max_tokens=1, messages=HELLO)
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "the model 'other' is not served here; this server has 'tiny'",
        },
    }
    with pytest.raises(anthropic.BadRequestError, match="temperature must be in"):
        claude.messages.create(model="tiny", max_tokens=1, messages=HELLO, extra_body={"temperature": -1})
    server.engine.error = "broken"
    with pytest.raises(anthropic.InternalServerError, match="broken"):
        claude.messages.create(model="tiny", max_tokens=1, messages=HELLO)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}]},
         "belong to the assistant"),
        ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"stop_sequences": [""]}, "stop_sequences must not hold"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
    ],
)  # fmt: skip
def test_mistakes_are_named(server: LiveServer, change: dict[str, object], says: str) -> None:
    body = {"model": "tiny", "max_tokens": 1, "messages": HELLO, **change}
    status, answer = server.post("/v1/messages", **body)
    assert status == 400 and answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error" and says in answer["error"]["message"]


def test_an_error_in_a_stream_is_its_last_event(server: LiveServer) -> None:
    with LiveServer(request_timeout=0.2, drain_timeout=0.2) as slow:
        slow.engine.pace = 0.03
        body = {"model": "tiny", "max_tokens": 100, "messages": HELLO, "stream": True}
        _, _, raw = slow.raw("POST", "/v1/messages", json.dumps(body).encode())
    last = raw.decode().strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_the_key_comes_in_anthropics_header() -> None:
    with LiveServer(api_key="right", drain_timeout=0.2) as server:
        for key, works in (("right", True), ("wrong", False)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as claude:
                if works:
                    assert claude.messages.create(model="tiny", max_tokens=1, messages=HELLO).content
                else:
                    with pytest.raises(anthropic.AuthenticationError):
                        claude.messages.create(model="tiny", max_tokens=1, messages=HELLO)
