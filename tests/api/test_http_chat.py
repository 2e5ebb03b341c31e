"""`/v1/chat/completions` over real HTTP, with scripted tokens."""

import json
from pathlib import Path

import pytest

from rvllm.api.assembly import template_text
from support.doubles.server import ANSWER, LiveServer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def text_of(server: LiveServer, tokens: int) -> str:
    return server.tokenizer.decode(server.engine.answer[:tokens])


def test_an_answer_has_openais_shape(server: LiveServer) -> None:
    status, answer = server.chat(max_tokens=5, model="tiny")
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    prompt = len(server.engine.requests[-1].prompt_token_ids)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_the_template_makes_the_prompt(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.chat(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        max_tokens=1,
    )
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_max_tokens_the_context_is_the_limit(server: LiveServer) -> None:
    server.chat(stop="fox")
    request = server.engine.requests[-1]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


def test_parameters_reach_the_engine(server: LiveServer) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
             "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 11, "min_tokens": 2}  # fmt: skip
    status, _ = server.chat(
        **given, max_completion_tokens=3, logit_bias={"5": -100}, priority=4, stop_token_ids=[9]
    )
    assert status == 200
    request = server.engine.requests[-1]
    for name, value in given.items():
        assert getattr(request.sampling, name) == value, name
    assert request.sampling.max_tokens == 3
    assert request.sampling.logit_bias == ((5, -100.0),)
    assert request.priority == 4
    assert 9 in request.sampling.stop_token_ids
    assert server.tokenizer.eos_token_id in request.sampling.stop_token_ids
    server.chat(ignore_eos=True, max_tokens=1)
    assert server.engine.requests[-1].sampling.stop_token_ids == ()


def test_a_stream_begins_with_the_role_and_joins_to_the_answer(server: LiveServer) -> None:
    count = len(server.engine.answer)
    events = server.events(CHAT, messages=HELLO, max_tokens=count, stream_options={"include_usage": True})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == count
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(pieces) == ANSWER
    assert not any("\ufffd" in piece for piece in pieces)
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert all(e["usage"] is None for e in events[:-1])
    assert {e["object"] for e in events} == {"chat.completion.chunk"}


def test_no_usage_unless_asked_for(server: LiveServer) -> None:
    events = server.events(CHAT, messages=HELLO, max_tokens=2)
    assert not any("usage" in event for event in events)


def test_several_choices(server: LiveServer) -> None:
    _, answer = server.chat(n=3, max_tokens=4, seed=5)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {text_of(server, 4)}
    assert answer["usage"]["completion_tokens"] == 12
    assert sorted(r.sampling.seed for r in server.engine.requests[-3:]) == [5, 6, 7]
    events = server.events(CHAT, messages=HELLO, n=2, max_tokens=3)
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == text_of(server, 3)
        assert mine[-1]["finish_reason"] == "length"


def test_a_stop_string_ends_the_answer_and_the_engines_work(server: LiveServer) -> None:
    before = len(server.engine.aborted)
    _, answer = server.chat(stop=[" hello"], max_tokens=200)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == ANSWER.partition(" hello")[0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " hello")
    assert len(server.engine.aborted) == before + 1
    _, answer = server.chat(stop=" hello", include_stop_str_in_output=True, max_tokens=200)
    assert answer["choices"][0]["message"]["content"].endswith(" hello")


def test_a_stop_token_is_the_stop_reason(server: LiveServer) -> None:
    token = server.engine.answer[3]
    _, answer = server.chat(stop_token_ids=[token], max_tokens=20)
    assert answer["choices"][0]["stop_reason"] == token
    assert answer["usage"]["completion_tokens"] == server.engine.answer.index(token) + 1


def test_logprobs(server: LiveServer) -> None:
    _, answer = server.chat(logprobs=True, top_logprobs=2, max_tokens=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry, token in zip(content, server.engine.answer, strict=False):
        assert bytes(entry["bytes"]) == server.tokenizer.token_bytes(token)
        assert entry["logprob"] == -0.5
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    _, answer = server.chat(logprobs=True, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    _, answer = server.chat(logprobs=True, max_tokens=1, return_tokens_as_token_ids=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{server.engine.answer[0]}"
    events = server.events(CHAT, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=1)
    streamed = [
        t for e in events if e["choices"][0]["logprobs"] for t in e["choices"][0]["logprobs"]["content"]
    ]
    assert len(streamed) == 3


def test_token_ids_and_prompt_logprobs_on_request(server: LiveServer) -> None:
    _, answer = server.chat(return_token_ids=True, prompt_logprobs=1, max_tokens=2)
    request = server.engine.requests[-1]
    assert answer["prompt_token_ids"] == request.prompt_token_ids
    assert answer["choices"][0]["token_ids"] == server.engine.answer[:2]
    assert answer["prompt_logprobs"][0] is None
    assert str(request.prompt_token_ids[1]) in answer["prompt_logprobs"][1]
    events = server.events(CHAT, messages=HELLO, max_tokens=3, return_token_ids=True)
    ids = [i for e in events for i in e["choices"][0].get("token_ids", [])]
    assert ids == server.engine.answer[:3]


def test_the_last_message_can_be_continued_and_echoed(server: LiveServer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "the quick"}]
    _, answer = server.chat(messages=messages, continue_final_message=True, echo=True, max_tokens=1)
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith("<|im_start|>assistant\nthe quick")
    assert answer["choices"][0]["message"]["content"] == "the quick" + text_of(server, 1)
    _, answer = server.chat(messages=HELLO, echo=True, max_tokens=1)  # not the user's own words
    assert answer["choices"][0]["message"]["content"] == text_of(server, 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"priority": 2**40}, "priority"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": [10**20]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "the " * 400}]}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"structural_tag": {"triggers": []}}, "structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_wrong_parameter_is_a_400_that_names_it(server: LiveServer, body: dict, param: str) -> None:
    before = len(server.engine.requests)
    status, answer = server.chat(**body)
    assert status == 400, answer
    assert answer["error"]["param"] == param, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]
    assert len(server.engine.requests) == before


def test_neutral_values_and_unknown_fields_are_no_error(server: LiveServer) -> None:
    neutral = {
        "response_format": {"type": "text"},
        "tools": None,
        "top_k": -1,
        "store": False,
        "tool_choice": "none",
        "prediction": {"type": "content", "content": "hello"},  # of the answer: OpenAI's are faster by it
    }
    status, _ = server.chat(max_tokens=1, user="u", never_heard_of=[1], metadata={"a": "b"}, **neutral)
    assert status == 200


@pytest.mark.parametrize("words", [400, 20_000])  # the longer one is tokenised beside the event loop
def test_a_prompt_too_long_says_by_how_much(server: LiveServer, words: int) -> None:
    _, answer = server.chat(messages=[{"role": "user", "content": "the " * words}])
    assert answer["error"]["code"] == "context_length_exceeded"
    assert "256" in answer["error"]["message"]


def test_an_engine_error_is_a_500_also_in_a_stream_that_has_not_begun(server: LiveServer) -> None:
    server.engine.error = "no token fits the grammar"
    status, answer = server.chat(guided_choice=["a"])
    assert status == 400 and "no token fits" in answer["error"]["message"]
    server.engine.error = "no block is left"
    status, answer = server.chat()
    assert (status, answer["error"]["message"]) == (500, "no block is left")
    status, answer = server.chat(stream=True)
    assert status == 500


def test_tools_and_calls_reach_the_template() -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.arguments.city }}>{% endfor %}"
        "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %};{% endfor %}{{ mood }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    rest = "user:hi;assistant:<Oslo>;tool:rain#1;"
    with LiveServer(template=template, drain_timeout=0.2) as server:
        for choice, expected in (("auto", "[weather]" + rest), ("none", rest)):
            status, answer = server.chat(messages=messages, tools=tools, tool_choice=choice, max_tokens=1)
            assert status == 200, answer
            assert server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids) == expected
        server.chat(chat_template_kwargs={"mood": "glad"}, max_tokens=1)
        assert server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids) == "user:hello;glad"


def test_a_template_that_raises_is_the_clients_error() -> None:
    with LiveServer(template="{{ raise_exception('roles must alternate') }}", drain_timeout=0.2) as server:
        status, answer = server.chat()
        assert status == 400
        assert "roles must alternate" in answer["error"]["message"]


def test_a_chat_template_is_a_file_or_itself(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert template_text(None) is None
    assert template_text("{{ x }}") == "{{ x }}" and template_text("{% if x %}{% endif %}").startswith("{%")
    assert template_text(str(tmp_path / "t.jinja")) == "{{ messages }}"
