"""`/v1/completions` over real HTTP, with scripted tokens."""

import json

import pytest

from support.doubles.server import LiveServer

PATH = "/v1/completions"


def decoded(server: LiveServer, tokens: int) -> str:
    return server.tokenizer.decode(server.engine.answer[:tokens])


def test_the_default_is_sixteen_tokens(server: LiveServer) -> None:
    status, answer = server.post(PATH, prompt="hello")
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["text"] == decoded(server, 16)


@pytest.mark.parametrize("kind", ["text", "ids", "texts", "lists"])
def test_prompts_of_every_kind(server: LiveServer, kind: str) -> None:
    one, two = server.tokenizer.encode("hello world"), server.tokenizer.encode("the fox")
    prompt = {"text": "hello world", "ids": one, "texts": ["hello world", "the fox"], "lists": [one, two]}[
        kind
    ]
    _, answer = server.post(PATH, prompt=prompt, max_tokens=2, n=2)
    expected = [one, one] if kind in ("text", "ids") else [one, one, two, two]
    assert [c["index"] for c in answer["choices"]] == list(range(len(expected)))
    made = server.engine.requests[-len(expected) :]
    assert sorted(r.prompt_token_ids for r in made) == sorted(expected)
    prompts = [one] if kind in ("text", "ids") else [one, two]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_echo_with_logprobs_covers_the_prompt(server: LiveServer) -> None:
    _, answer = server.post(PATH, prompt="hello world", echo=True, logprobs=1, max_tokens=2)
    choice = answer["choices"][0]
    assert choice["text"] == "hello world" + decoded(server, 2)
    logprobs = choice["logprobs"]
    count = len(server.tokenizer.encode("hello world")) + 2
    assert {len(logprobs[key]) for key in logprobs} == {count}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    offsets = [sum(map(len, logprobs["tokens"][:i])) for i in range(count)]
    assert logprobs["text_offset"] == offsets


def test_echo_with_no_new_tokens_scores_the_prompt_alone(server: LiveServer) -> None:
    _, answer = server.post(PATH, prompt="hello world", echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "hello world"
    assert len(choice["logprobs"]["tokens"]) == len(server.tokenizer.encode("hello world"))
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stream_joins_to_the_answer(server: LiveServer) -> None:
    for options in ({}, {"echo": True, "logprobs": 2}):
        _, whole = server.post(PATH, prompt="hello", max_tokens=30, **options)
        events = server.events(
            PATH, prompt="hello", max_tokens=30, stream_options={"include_usage": True}, **options
        )
        assert events[-1]["usage"] == whole["usage"]
        choices = [e["choices"][0] for e in events[:-1]]
        assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
        assert choices[-1]["finish_reason"] == "length"
        parts = [c["logprobs"] for c in choices if c["logprobs"]]
        if options:
            for key in ("tokens", "text_offset", "token_logprobs"):
                assert [v for p in parts for v in p[key]] == whole["choices"][0]["logprobs"][key]


def test_several_prompts_stream_under_their_own_indices(server: LiveServer) -> None:
    events = server.events(PATH, prompt=["hello", "world"], max_tokens=3, n=2)
    for index in range(4):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == decoded(server, 3)
        assert [c["finish_reason"] for c in mine][-1] == "length"


def test_token_ids_on_request(server: LiveServer) -> None:
    _, answer = server.post(PATH, prompt=[1, 2, 3], max_tokens=4, return_token_ids=True, prompt_logprobs=0)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == [1, 2, 3]
    assert choice["token_ids"] == server.engine.answer[:4]
    assert list(choice["prompt_logprobs"][1]) == ["2"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 50}, "prompt"),
        ({"prompt": ["a"] * 10, "n": 2}, "n"),
        ({"prompt": "the " * 400}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_wrong_parameter_is_a_400_that_names_it(server: LiveServer, body: dict, param: str) -> None:
    status, answer = server.post(PATH, **body)
    assert status == 400, answer
    assert (answer["error"]["param"] or "").startswith(param), answer


MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")


def test_a_suffix_becomes_a_prompt_with_a_gap() -> None:
    filling = LiveServer(drain_timeout=0.2)
    filling.tokenizer.backend.add_special_tokens(list(MARKS))
    end = filling.tokenizer.convert_tokens_to_ids("<|fim_pad|>")
    with filling as server:
        server.engine.answer = [*server.engine.answer[:3], end, *server.engine.answer[3:]]
        status, answer = server.post(PATH, prompt="hello", suffix=" world", max_tokens=9)
        assert status == 200, answer
        (made,) = server.engine.requests
        assert server.tokenizer.decode(made.prompt_token_ids) == "{}hello{} world{}".format(*MARKS)
        choice = answer["choices"][0]
        assert choice["text"] == server.tokenizer.decode(server.engine.answer[:3])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert answer["usage"]["prompt_tokens"] == len(made.prompt_token_ids)

        ids = server.tokenizer.encode("hello")
        _, same = server.post(PATH, prompt=ids, suffix=" world", max_tokens=9)
        assert same["choices"] == answer["choices"]
        assert server.engine.requests[-1].prompt_token_ids == made.prompt_token_ids
        _, on = server.post(PATH, prompt="hello", suffix=" world", max_tokens=9, ignore_eos=True)
        assert on["choices"][0]["finish_reason"] == "length"
        _, told = server.post(PATH, prompt="hello", suffix="x", stop_token_ids=[end])
        assert told["choices"][0]["stop_reason"] == end
        for body in ({"suffix": "b", "echo": True}, {"suffix": "the " * 40_000}, {"suffix": 1}):
            status, answer = server.post(PATH, prompt="a", **body)
            assert (status, answer["error"]["param"]) == (400, "suffix"), answer
        status, answer = server.post(PATH, prompt="the " * 200, suffix="the " * 200)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_an_empty_suffix_asks_for_nothing(server: LiveServer) -> None:
    _, plain = server.post(PATH, prompt="hello", max_tokens=3)
    _, same = server.post(PATH, prompt="hello", max_tokens=3, suffix="")
    assert same["choices"] == plain["choices"]


def test_bad_words_and_allowed_tokens_reach_the_engine(server: LiveServer) -> None:
    status, answer = server.post("/v1/completions", prompt="a", bad_words=["hello"], allowed_token_ids=[5, 6])
    assert status == 200, answer
    sampling = server.engine.requests[-1].sampling
    assert sampling.allowed_token_ids == (5, 6)
    assert sampling.bad_words[0] == tuple(server.tokenizer.encode("hello"))
    for body, param in (
        ({"bad_words": [""]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
    ):
        status, answer = server.post("/v1/completions", prompt="a", **body)
        assert status == 400 and param in answer["error"]["message"], answer


def test_what_the_cache_held_of_a_prompt_is_counted_once(server: LiveServer) -> None:
    """The second of two choices finds what the first has just computed; it counts as the first saw it."""
    server.engine.cached = [1, 9]
    _, answer = server.post(PATH, prompt=["hello", "the fox"], n=2, max_tokens=2)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 1 + 1


def test_ranks_of_prompt_logprobs_begin_with_one(server: LiveServer) -> None:
    _, answer = server.post(PATH, prompt="hello world", prompt_logprobs=3, max_tokens=1)
    first, *others = answer["choices"][0]["prompt_logprobs"]
    tokens = server.tokenizer.encode("hello world")
    assert first is None and len(others) == len(tokens) - 1
    for token, found in zip(
        tokens[1:], others, strict=True
    ):  # the double calls the token itself the likeliest
        assert {int(i): entry["rank"] for i, entry in found.items()} == {
            (token + i) % 500: i + 1 for i in range(3)
        }


def test_usage_that_runs_along(server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events(PATH, prompt="hello", max_tokens=3, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert sorted(counts) == counts and counts[0] >= 1 and counts[-1] == 3 and events[-1]["choices"] == []
    events = server.events(PATH, prompt="hello", max_tokens=3, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)


def test_time_in_the_queue_is_in_the_metrics_and_in_the_header(server: LiveServer) -> None:
    def total() -> float:
        lines = server.raw("GET", "/metrics")[2].decode().splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("vllm:request_queue_time_seconds_sum"))

    before, server.engine.queue_seconds = total(), 2.5
    body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
    _, headers, _ = server.raw("POST", PATH, body, {"x-rvllm-timing": "1"})
    assert total() - before == pytest.approx(2.5)
    queue = next(part for part in headers["x-rvllm-timing"].split(", ") if part.startswith("queue;dur="))
    assert 2500 <= float(queue.partition("=")[2]) < 4500
