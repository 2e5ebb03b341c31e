"""`/v1/responses` and `/v1/conversations` with the official client, and where they are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from rvllm.api.responses.store import Conversation, ResponseStore
from rvllm.api.schemas.responses import ResponsesRequest, new_response
from rvllm.errors import UsageError
from support.doubles.server import ANSWER, CONTEXT, LiveServer
from support.waiting import until


def test_create_retrieve_delete(client: openai.OpenAI, server: LiveServer) -> None:
    made = client.responses.create(
        model="tiny", input="hello", instructions="Be brief.", max_output_tokens=6, temperature=0.5,
        metadata={"topic": "greeting"},
    )  # fmt: skip
    assert made.output_text == server.tokenizer.decode(server.engine.answer[:6])
    assert (made.status, made.incomplete_details and made.incomplete_details.reason) == (
        "incomplete", "max_output_tokens"
    )  # fmt: skip
    assert made.parallel_tool_calls is True
    assert made.usage is not None
    assert made.usage.output_tokens == 6 and made.usage.input_tokens_details.cached_tokens == 4
    assert made.usage.input_tokens == len(server.engine.requests[-1].prompt_token_ids)
    assert "Be brief." in server.last_prompt()
    kept = client.responses.retrieve(made.id)
    assert kept.to_dict() == made.to_dict() and kept.metadata == {"topic": "greeting"}
    [item] = client.responses.input_items.list(made.id).data
    assert item.type == "message" and item.role == "user" and item.content[0].type == "input_text"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_stream(client: openai.OpenAI, server: LiveServer) -> None:
    count = len(server.engine.answer)
    events = list(client.responses.create(model="tiny", input="hello", max_output_tokens=count, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    assert events[0].type == "response.created" and events[0].response.output == []
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == ANSWER
    assert client.responses.retrieve(last.response.id).output_text == ANSWER


def test_the_clients_own_stream_accumulator(client: openai.OpenAI, server: LiveServer) -> None:
    answer, end = server.engine.answer, server.tokenizer.eos_token_id
    assert end is not None
    server.engine.answer = [*answer[:5], end]
    with client.responses.stream(model="tiny", input="hello") as stream:
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == server.tokenizer.decode(answer[:5])


def test_logprobs(client: openai.OpenAI, server: LiveServer) -> None:
    made = client.responses.create(
        model="tiny",
        input="hello",
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    message = made.output[0]
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None and [len(entry.top_logprobs) for entry in logprobs] == [2] * 5
    assert made.top_logprobs == 2
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=2,
                                   include=["message.output_text.logprobs"])  # fmt: skip
    assert [entry.top_logprobs for entry in made.output[0].content[0].logprobs] == [[]] * 2


def test_previous_responses_are_read_but_not_their_instructions(
    client: openai.OpenAI, server: LiveServer
) -> None:
    first = client.responses.create(model="tiny", input="alpha", instructions="secret", max_output_tokens=3)
    second = client.responses.create(
        model="tiny", input=[{"role": "user", "content": [{"type": "input_text", "text": "beta"}]}],
        previous_response_id=first.id, max_output_tokens=3,
    )  # fmt: skip
    prompt = server.last_prompt()
    assert prompt.index("alpha") < prompt.index(first.output_text) < prompt.index("beta")
    assert "secret" not in prompt
    client.responses.delete(first.id)
    third = client.responses.create(
        model="tiny", input="gamma", previous_response_id=second.id, max_output_tokens=1
    )
    prompt = server.last_prompt()
    assert prompt.index("alpha") < prompt.index("beta") < prompt.index("gamma")
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    assert [item.type for item in items] == ["message"] * 5  # the client asks for page after page
    assert items.data[0].id == client.responses.input_items.list(second.id, order="asc").data[0].id


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", store=False, max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="tiny", input="hello", previous_response_id=made.id)
    assert missing.value.param == "previous_response_id"


def test_calls_and_their_outputs_become_chat_messages(server: LiveServer) -> None:
    status, made = server.post("/v1/responses", max_output_tokens=1, input=[
        {"type": "message", "role": "user", "content": "add one"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{\"a\": 1}"},
        {"type": "function_call_output", "call_id": "c1", "output": "seven"},
        {"role": "user", "content": "so?"},
    ])  # fmt: skip
    assert status == 200, made
    prompt = server.last_prompt()
    places = [prompt.index(word) for word in ("add one", "seven", "so?")]
    assert places == sorted(places)
    assert prompt.count("<|im_start|>assistant") == 2


def test_background(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.pace = 0.005
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=20, background=True)
    assert made.status == "queued" and made.output == []
    seen = {made.status}
    while made.status in ("queued", "in_progress"):
        made = client.responses.retrieve(made.id)
        seen.add(str(made.status))
    assert made.status == "incomplete" and made.output_text == server.tokenizer.decode(
        server.engine.answer[:20]
    )
    assert "in_progress" in seen
    events = list(client.responses.retrieve(made.id, stream=True, starting_after=4))
    assert events[0].sequence_number == 5
    assert events[-1].type == "response.incomplete"
    assert client.responses.cancel(made.id).status == "incomplete"
    client.responses.delete(made.id)


def test_a_background_stream_can_be_joined_and_cancelled(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.pace = 0.01
    aborted = len(server.engine.aborted)
    stream = client.responses.create(model="tiny", input="hello", background=True, stream=True)
    first = next(iter(stream))
    assert first.type == "response.queued"
    stream.close()  # it goes on without its client
    joined = client.responses.retrieve(first.response.id, stream=True)
    kinds = []
    for event in joined:
        kinds.append(event.type)
        if len(kinds) == 6:
            assert client.responses.cancel(first.response.id).status == "cancelled"
    assert kinds[:2] == ["response.queued", "response.in_progress"]
    assert client.responses.retrieve(first.response.id).status == "cancelled"
    assert len(server.engine.aborted) == aborted + 1


def test_a_client_that_leaves_its_stream_cancels_the_response(
    client: openai.OpenAI, server: LiveServer
) -> None:
    server.engine.pace = 0.01
    for store in (True, False):
        aborted = len(server.engine.aborted)
        stream = client.responses.create(model="tiny", input="hello", stream=True, store=store)
        seen, name = "", ""
        for event in stream:
            name = event.response.id if event.type == "response.created" else name
            seen += event.delta if event.type == "response.output_text.delta" else ""
            if len(seen) > 10:
                break
        stream.close()
        until(lambda: len(server.engine.aborted) > aborted and not server.gate.working)  # noqa: B023
        assert len(server.engine.aborted) == aborted + 1
        if not store:
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(name)
            continue
        kept = client.responses.retrieve(name)
        assert kept.status == "cancelled" and kept.error is None
        assert kept.output_text.startswith(seen) and kept.output[0].status == "incomplete"


def test_a_stream_that_the_server_ends_has_failed(tmp_path: Path) -> None:
    database = tmp_path / "responses.db"
    with LiveServer(drain_timeout=0.1, responses_db=str(database)) as server:
        server.engine.pace = 0.02
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            stream = iter(client.responses.create(model="tiny", input="hello", stream=True))
            name = next(stream).response.id
            next(stream)
            server.call(server.stop.first.set)
            with pytest.raises(openai.APIError):
                list(stream)
    with LiveServer(responses_db=str(database), drain_timeout=0.1) as server:
        _, _, body = server.raw("GET", f"/v1/responses/{name}")
        kept = json.loads(body)
        assert kept["status"] == "failed" and "shutting down" in kept["error"]["message"]


def test_failures(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.error = "broken"
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.responses.create(model="tiny", input="hello")
    made = client.responses.create(model="tiny", input="hello", background=True)
    until(lambda: client.responses.retrieve(made.id).status == "failed")
    error = client.responses.retrieve(made.id).error
    assert error is not None and error.message == "broken" and error.code == "server_error"


def test_truncation_auto_leaves_out_the_oldest(client: openai.OpenAI, server: LiveServer) -> None:
    long: list[Any] = [{"role": "user", "content": f"number {i} " + "hello world " * 8} for i in range(20)]
    with pytest.raises(openai.BadRequestError) as full:
        client.responses.create(model="tiny", input=long)
    assert full.value.code == "context_length_exceeded" and full.value.param == "input"
    assert str(CONTEXT) in full.value.message
    client.responses.create(model="tiny", input=long, truncation="auto", max_output_tokens=1)
    assert "number 19 " in server.last_prompt() and "number 0 " not in server.last_prompt()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "nobody", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": "a", "background": True, "store": False}, "background"),
        ({"input": "a", "truncation": "some"}, "truncation"),
        ({"input": "a", "include": ["everything"]}, "include"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "temperature": 1000}, "temperature"),
        ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "a", "metadata": {"k" * 65: "v"}}, "metadata"),
        ({"input": "a", "prompt": {"id": "x"}}, "prompt"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
def test_mistakes_name_the_field(server: LiveServer, body: dict[str, Any], param: str) -> None:
    status, answer = server.post("/v1/responses", **body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_conversations(client: openai.OpenAI, server: LiveServer) -> None:
    made = client.conversations.create(
        metadata={"a": "b"}, items=[{"type": "message", "role": "user", "content": "alpha"}]
    )
    answer = client.responses.create(model="tiny", input="beta", conversation=made.id, max_output_tokens=3)
    assert answer.conversation is not None and answer.conversation.id == made.id
    prompt = server.last_prompt()
    assert prompt.index("alpha") < prompt.index("beta")
    items = client.conversations.items.list(made.id, order="asc").data
    assert [getattr(item, "role", "") for item in items] == ["user", "user", "assistant"]
    client.responses.create(model="tiny", input="gamma", conversation=made.id, max_output_tokens=1)
    prompt = server.last_prompt()
    assert prompt.index("beta") < prompt.index(answer.output_text) < prompt.index("gamma")
    added = client.conversations.items.create(made.id, items=[{"role": "user", "content": "delta"}])
    [item] = added.data
    assert item.id is not None
    assert client.conversations.items.retrieve(item.id, conversation_id=made.id).id == item.id
    client.conversations.items.delete(item.id, conversation_id=made.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(item.id, conversation_id=made.id)
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.retrieve(made.id).metadata == {"c": "d"}
    assert len(list(client.conversations.items.list(made.id, limit=2))) == 5
    client.conversations.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="tiny", input="x", conversation=made.id)


def test_a_file_keeps_responses_over_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with LiveServer(responses_db=path, drain_timeout=0.2) as server:
        _, made = server.post("/v1/responses", input="hello", max_output_tokens=2)
        server.engine.pace = 0.05
        _, cut = server.post("/v1/responses", input="hello", background=True)
        with pytest.raises(UsageError, match=r"--responses-db.*another server"):
            ResponseStore(path, 0, 10**9)
    with LiveServer(responses_db=path, drain_timeout=0.2) as server:
        assert server.raw("GET", f"/v1/responses/{made['id']}")[0] == 200
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            assert client.responses.retrieve(cut["id"]).status == "failed"
        again = server.post("/v1/responses", input="x", previous_response_id=made["id"], max_output_tokens=1)
        assert again[0] == 200


def test_the_store_is_bounded_in_size_and_time() -> None:
    now = [1000.0]
    store = ResponseStore(":memory:", ttl=100, limit=20_000, clock=lambda: now[0])
    request = ResponsesRequest(input="x", metadata={"k": "v" * 500})
    for i in range(50):
        now[0] += 1
        store.put(new_response(request, f"resp_{i}", "tiny", 0), [{"id": "a", "text": "y" * 100}])
        assert store.size <= 20_000
    assert store.get("resp_0") is None and store.get("resp_49") is not None
    store.put_conversation(Conversation(id="conv_1", created_at=0, metadata={}))
    store.add_items("conv_1", [{"id": f"i{i}", "text": "z" * 100} for i in range(10)])
    assert store.size <= 20_000 and len(store.items("conv_1")) == 10
    now[0] += 101
    assert store.get("resp_49") is None and store.conversation("conv_1") is None and store.size == 0


def test_a_server_that_was_killed_left_nothing_in_progress(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    store = ResponseStore(path, 0, 10**9)
    queued = new_response(ResponsesRequest(input="x", background=True), "resp_1", "tiny", 0)
    queued.status = "queued"
    store.put(queued, [])
    store.close()
    again = ResponseStore(path, 0, 10**9).get("resp_1")
    assert again is not None and again.response.status == "failed" and again.response.error is not None
