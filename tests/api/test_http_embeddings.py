"""Vectors over HTTP: the official client, forms, lengths, scores, and models that give no vectors."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from support.doubles.server import CONTEXT, LiveServer

SIZE = 16


@pytest.fixture(scope="module")
def encoder() -> Iterator[LiveServer]:
    with LiveServer(embedding_size=SIZE, drain_timeout=0.2) as live:
        yield live


def expected(server: LiveServer, text: str | list[int]) -> np.ndarray:
    ids = server.tokenizer.encode(text) if isinstance(text, str) else text
    vector = np.zeros(SIZE, np.float32)
    for token in ids:
        vector[token % SIZE] += 1 + token / 1000
    return vector / np.linalg.norm(vector)


def test_the_official_client(encoder: LiveServer) -> None:
    texts = [f"text {i} hello world" * (i % 5 + 1) for i in range(100)]
    with openai.OpenAI(base_url=encoder.url + "/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="tiny", input=texts)
        assert [entry.index for entry in found.data] == list(range(100))
        for text, entry in zip(texts, found.data, strict=True):
            assert np.array_equal(np.array(entry.embedding, np.float32), expected(encoder, text))
        assert found.usage.prompt_tokens == sum(len(encoder.tokenizer.encode(text)) for text in texts)
        short = client.embeddings.create(model="tiny", input="hello world", dimensions=4)
        cut = expected(encoder, "hello world")[:4]
        assert np.allclose(short.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-6)


def test_token_ids_and_both_forms(encoder: LiveServer) -> None:
    status, one = encoder.post("/v1/embeddings", input=[5, 6, 7])
    assert status == 200 and len(one["data"]) == 1
    assert np.allclose(one["data"][0]["embedding"], expected(encoder, [5, 6, 7]))
    status, two = encoder.post("/v1/embeddings", input=[[5, 6, 7], "hello"], encoding_format="base64")
    raw = np.frombuffer(base64.b64decode(two["data"][0]["embedding"]), "<f4")
    assert np.array_equal(raw, np.array(one["data"][0]["embedding"], np.float32))
    assert two["usage"] == {"prompt_tokens": 3 + len(encoder.tokenizer.encode("hello")),
                            "total_tokens": 3 + len(encoder.tokenizer.encode("hello"))}  # fmt: skip


def test_long_texts(encoder: LiveServer) -> None:
    ids = [5 + i % 90 for i in range(CONTEXT + 9)]
    status, answer = encoder.post("/v1/embeddings", input=ids)
    assert (status, answer["error"]["param"]) == (400, "input")
    assert f"{CONTEXT + 9} tokens" in answer["error"]["message"]
    assert str(CONTEXT) in answer["error"]["message"]
    assert "truncate_prompt_tokens" in answer["error"]["message"]
    for keep, length in ((-1, CONTEXT), (7, 7)):
        status, answer = encoder.post("/v1/embeddings", input=ids, truncate_prompt_tokens=keep)
        assert status == 200 and answer["usage"]["prompt_tokens"] == length
        assert np.allclose(answer["data"][0]["embedding"], expected(encoder, ids[:length]))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({}, "input"),
        ({"input": "a", "dimensions": 17}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "priority": 1 << 40}, "priority"),
    ],
)
def test_mistakes_name_the_field(encoder: LiveServer, body: dict[str, object], param: str) -> None:
    status, answer = encoder.post("/v1/embeddings", **body)
    assert (status, answer["error"]["param"]) == (400, param)


def test_score(encoder: LiveServer) -> None:
    texts = ["hello world", "the quick fox", "日本語"]
    query, *vectors = [expected(encoder, text) for text in ["hello", *texts]]
    status, answer = encoder.post("/v1/score", text_1="hello", text_2=texts)
    for one, two in (("queries", "documents"), ("data_1", "data_2")):
        assert encoder.post("/v1/score", **{one: "hello", two: texts})[1]["data"] == answer["data"]
    assert status == 200
    assert np.allclose([entry["score"] for entry in answer["data"]], [query @ v for v in vectors], atol=1e-6)
    encoder.engine.length = 3.0  # the angle counts alone
    longer = encoder.post("/v1/score", text_1="hello", text_2=texts)[1]["data"]
    assert [e["score"] for e in longer] == pytest.approx([e["score"] for e in answer["data"]], abs=1e-6)
    _, pairs = encoder.post("/score", text_1=texts, text_2=texts)
    encoder.engine.length = 1.0
    assert np.allclose([entry["score"] for entry in pairs["data"]], 1, atol=1e-6)
    for wrong in ({"text_1": ["a", "b"], "text_2": ["c"]}, {"text_1": [], "text_2": ["c"]}):
        status, answer = encoder.post("/v1/score", **wrong)
        assert (status, answer["error"]["param"]) == (400, "text_1")


def test_rerank(encoder: LiveServer) -> None:
    texts = ["the quick fox", "hello", "日本語"]
    status, answer = encoder.post("/v1/rerank", query="hello", documents=[*texts[:2], {"text": texts[2]}])
    assert status == 200
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == sorted(scores, reverse=True) and sorted(e["index"] for e in answer["results"]) == [
        0,
        1,
        2,
    ]
    assert answer["results"][0]["document"] == {"text": "hello"} and scores[0] == pytest.approx(1)
    _, best = encoder.post("/rerank", query="hello", documents=texts, top_n=1, return_documents=False)
    assert [list(entry) for entry in best["results"]] == [["index", "relevance_score"]]
    for wrong in ({"documents": []}, {"documents": texts, "top_n": -1}):
        status, answer = encoder.post("/v1/rerank", query="hello", **wrong)
        assert status == 400 and answer["error"]["param"] in wrong


def test_each_model_does_its_own_work(encoder: LiveServer, server: LiveServer) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ):
        status, answer = server.post(path, **body)
        assert status == 400 and "gives no embeddings" in answer["error"]["message"]
    for path, body in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        status, answer = encoder.post(path, **body)
        assert status == 400 and "/v1/embeddings" in answer["error"]["message"]


def test_a_client_that_leaves_ends_the_work() -> None:
    with LiveServer(embedding_size=SIZE, request_timeout=0.2, drain_timeout=0.2) as server:
        server.engine.pace = 0.05
        status, _ = server.post("/v1/embeddings", input=["hello"] * 2000)
        assert status == 408
        assert len(server.engine.embeds) < 1000
        server.engine.pace = 0
        assert server.post("/v1/embeddings", input="hello")[0] == 200


def test_megabytes_are_refused_or_cut_before_they_are_tokenised(encoder: LiveServer) -> None:
    before = time.process_time()
    status, answer = encoder.post("/v1/embeddings", input="a " * 5_000_000)
    assert status == 400 and "characters" in answer["error"]["message"]
    status, answer = encoder.post("/v1/embeddings", input="hello " * 2_000_000, truncate_prompt_tokens=5)
    _, short = encoder.post("/v1/embeddings", input="hello " * 20, truncate_prompt_tokens=5)
    assert status == 200 and answer["data"] == short["data"]
    assert time.process_time() - before < 10


def test_vectors_of_tokens(encoder: LiveServer) -> None:
    texts = ["hello world", "hello"]
    status, answer = encoder.post("/pooling", input=texts, task="token_embed")
    assert status == 200, answer
    for text, entry in zip(texts, answer["data"], strict=True):
        rows = np.eye(SIZE)[np.array(encoder.tokenizer.encode(text)) % SIZE]
        assert np.allclose(entry["data"], rows)
    status, raw = encoder.post(
        "/pooling", input="hello", task="token_embed", use_activation=False, encoding_format="base64"
    )
    numbers = np.frombuffer(base64.b64decode(raw["data"][0]["data"]), "<f4").reshape(-1, SIZE)
    assert np.allclose(numbers.max(axis=1), 1 + np.array(encoder.tokenizer.encode("hello")) / 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rvllm.api.openai.pooler.MAX_NUMBERS", 3 * SIZE)
        status, answer = encoder.post("/pooling", input=[[5, 6], [7, 8]], task="token_embed")
    assert status == 400 and "one answer holds 48" in answer["error"]["message"]


def test_classes_of_texts() -> None:
    with LiveServer(embedding_size=3, labels=["good", "bad", "so so"], drain_timeout=0.2) as server:
        status, answer = server.post("/classify", input=["hello", "hello world"])
        assert status == 200, answer
        raw = [_raw(server, text, 3) for text in ("hello", "hello world")]
        for entry, numbers in zip(answer["data"], raw, strict=True):
            wanted = np.exp(numbers) / np.exp(numbers).sum()
            np.testing.assert_allclose(entry["probs"], wanted, atol=1e-6)
            assert entry["label"] == ["good", "bad", "so so"][int(wanted.argmax())]
            assert entry["num_classes"] == 3
        status, pooled = server.post("/pooling", input="hello", use_activation=False)
        np.testing.assert_allclose(pooled["data"][0]["data"], raw[0], atol=1e-6)
        assert (status, pooled["data"][0]["object"]) == (200, "pooling")
        for path, body, said in (
            ("/v1/embeddings", {"input": "a"}, "gives classes: use /classify"),
            ("/v1/score", {"text_1": "a", "text_2": "b"}, "scores are of models with one class"),
            ("/v1/completions", {"prompt": "a"}, "gives classes and generates no text"),
            ("/pooling", {"input": "a", "task": "embed"}, "gives classes and no vectors"),
            (
                "/pooling",
                {"input": "a", "task": "token_embed"},
                "gives classes and no vectors: use token_classify",
            ),
        ):
            status, answer = server.post(path, **body)
            assert status == 400 and said in answer["error"]["message"], answer
        with urllib.request.urlopen(f"{server.url}/v1/models") as answered:
            assert json.load(answered)["data"][0]["capabilities"]["classify"]


def _raw(server: LiveServer, text: str, size: int) -> np.ndarray:
    vector = np.zeros(size)
    for token in server.tokenizer.encode(text):
        vector[token % size] += 1 + token / 1000
    return vector / np.linalg.norm(vector)


def test_a_cross_encoder_reads_pairs() -> None:
    with LiveServer(embedding_size=1, labels=["LABEL_0"], drain_timeout=0.2) as server:
        status, answer = server.post("/v1/score", text_1="hello", text_2=["world", "hello there"])
        assert status == 200, answer
        ids = [embed.prompt_token_ids for embed in server.engine.embeds]
        pairs = [server.tokenizer.backend.encode("hello", other).ids for other in ("world", "hello there")]
        assert ids == pairs
        assert all(entry["score"] == pytest.approx(1 / (1 + np.exp(-1))) for entry in answer["data"])
        status, answer = server.post("/v1/rerank", query="hello", documents=["a", {"text": "b"}], top_n=1)
        assert status == 200 and answer["results"][0]["index"] == 0
        assert answer["usage"]["prompt_tokens"] == sum(
            len(server.tokenizer.backend.encode("hello", other).ids) for other in "ab"
        )


def test_vectors_by_the_general_name(encoder: LiveServer) -> None:
    status, answer = encoder.post("/pooling", input="hello", dimensions=4)
    cut = expected(encoder, "hello")[:4]
    assert status == 200 and np.allclose(answer["data"][0]["data"], cut / np.linalg.norm(cut), atol=1e-6)
    status, answer = encoder.post("/classify", input="hello")
    assert status == 400 and "gives vectors and no classes" in answer["error"]["message"]
    status, answer = encoder.post("/v1/embeddings", input="hello", prompt_name="query")
    assert (status, answer["error"]["param"]) == (400, "prompt_name")
