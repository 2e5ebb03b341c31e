"""The official `openai` client, sync and async, against the HTTP side."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from support.doubles.server import ANSWER, LiveServer
from support.waiting import until

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rvllm"


def test_chat(client: openai.OpenAI, server: LiveServer) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=6, n=2, logprobs=True, top_logprobs=3,
        stop=["never"], extra_body={"top_k": 5},
    )  # fmt: skip
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].message.content == server.tokenizer.decode(server.engine.answer[:6])
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3] * 6
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert server.engine.requests[-1].sampling.top_k == 5


def test_chat_stream(client: openai.OpenAI, server: LiveServer) -> None:
    count = len(server.engine.answer)
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=count, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == count


def test_the_clients_own_stream_accumulator_understands_the_events(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HELLO, stop=" hello") as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER.partition(" hello")[0]
    assert final.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI, server: LiveServer) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["hello", "world"], max_tokens=3, logprobs=2, echo=True
    )
    assert [choice.text for choice in answer.choices] == [
        prompt + server.tokenizer.decode(server.engine.answer[:3]) for prompt in ("hello", "world")
    ]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    parts = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=3, stream=True)
    assert "".join(part.choices[0].text for part in parts) == server.tokenizer.decode(
        server.engine.answer[:3]
    )


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    server.engine.error = "broken"
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.chat.completions.create(model="tiny", messages=HELLO)


def test_a_wrong_key_is_an_authentication_error() -> None:
    with LiveServer(api_key="right", drain_timeout=0.2) as server:
        right = openai.OpenAI(base_url=server.url + "/v1", api_key="right", max_retries=0)
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with right, wrong:
            assert right.models.list().data
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()


def test_many_at_once_with_the_async_client(server: LiveServer) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:

            async def one(tokens: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=HELLO, max_tokens=tokens, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(tokens) for tokens in range(1, 17)))

    expected = [server.tokenizer.decode(server.engine.answer[:n]).rstrip("\ufffd") for n in range(1, 17)]
    assert [text.rstrip("\ufffd") for text in asyncio.run(talk())] == expected


def test_closing_a_stream_aborts_the_request(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.pace = 0.01
    aborted = len(server.engine.aborted)
    with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
        next(iter(stream))
    until(lambda: len(server.engine.aborted) > aborted)
    assert len(server.engine.aborted) == aborted + 1
