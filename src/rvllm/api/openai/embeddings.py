"""`/v1/embeddings`, `/classify`, `/pooling`, `/v1/score`, `/v1/rerank`: what models give that pool texts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from rvllm.api.generate.generation import Service
from rvllm.api.http.errors import blaming, invalid
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.pooler import Pooler, Vector
from rvllm.api.schemas.embeddings import (
    Classes,
    ClassifyAnswer,
    ClassifyRequest,
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    Pooled,
    PoolingAnswer,
    PoolingRequest,
    RankedDocument,
    RerankAnswer,
    RerankRequest,
    Score,
    ScoreAnswer,
    ScoreRequest,
)
from rvllm.engine.ipc.messages import ModelFacts
from rvllm.text.embedding import PoolingParams, shorten
from rvllm.text.pooling import check_classes, given, of_tokens, pooling_task, probabilities


async def embeddings(service: Service, exchange: Exchange, request: EmbeddingRequest) -> None:
    """Answers with a vector for each text."""
    form = _form(request.encoding_format)
    facts = service.ready.facts
    if facts.labels is not None:
        raise invalid(f"{facts.architecture} gives classes: use /classify, or /v1/score for pairs of texts")
    _check_dimensions(facts, request.dimensions)
    encoder = Pooler(service, f"embd-{exchange.request_id}", "input", request)
    vectors = await encoder.vectors(_inputs(request.input))
    data = [
        Embedding(index=i, embedding=_shown(shorten(vector, request.dimensions), form))
        for i, vector in enumerate(vectors)
    ]
    await exchange.json(EmbeddingAnswer(data=data, **encoder.about()))


async def classify(service: Service, exchange: Exchange, request: ClassifyRequest) -> None:
    """Answers with each text's classes: how likely they are, and the likeliest one's name."""
    with blaming("model"):
        labels = check_classes(service.ready.facts)
    pooler = Pooler(service, f"classify-{exchange.request_id}", "input", request)
    data = []
    for i, numbers in enumerate(await pooler.vectors(_inputs(request.input))):
        found = probabilities(numbers, service.ready.facts, request.use_activation)
        label = labels[int(np.argmax(numbers))]
        data.append(Classes(index=i, label=label, probs=found.tolist(), num_classes=len(labels)))
    await exchange.json(ClassifyAnswer(data=data, **pooler.about()))


async def pooling(service: Service, exchange: Exchange, request: PoolingRequest) -> None:
    """Answers with what the model gives for each text, or for each of its tokens: vectors or classes."""
    facts, form = service.ready.facts, _form(request.encoding_format)
    with blaming("task"):
        task = pooling_task(facts, request.task)
    _check_dimensions(facts, request.dimensions)
    pooler = Pooler(service, f"pool-{exchange.request_id}", "input", request, of_tokens(task))
    params = PoolingParams(dimensions=request.dimensions, use_activation=request.use_activation)
    data = [
        Pooled(index=i, data=_shown(given(task, numbers, facts, params), form))
        for i, numbers in enumerate(await pooler.vectors(_inputs(request.input)))
    ]
    await exchange.json(PoolingAnswer(data=data, **pooler.about()))


async def score(service: Service, exchange: Exchange, request: ScoreRequest) -> None:
    """Answers with the score of each pair of texts: a cross-encoder's, or the cosine of their vectors."""
    name, first, second = _sides(request)
    pooler = Pooler(service, f"score-{exchange.request_id}", name, request)
    scores = await pooler.scores(first, second)
    data = [Score(index=i, score=value) for i, value in enumerate(scores)]
    await exchange.json(ScoreAnswer(data=data, **pooler.about()))


def _sides(request: ScoreRequest) -> tuple[str, list[str], list[str]]:
    """(the first side's name, the texts of both sides). Raises a 400 when they do not fit together."""
    pairs = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
    given = [(one, two) for one, two in pairs if getattr(request, one) or getattr(request, two)]
    if len(given) > 1:
        raise invalid(f"{given[0][0]} and {given[1][0]} exclude each other", given[1][0])
    name, other = given[0] if given else pairs[0]
    first, second = getattr(request, name) or [], getattr(request, other) or []
    first = [first] if isinstance(first, str) else first
    second = [second] if isinstance(second, str) else second
    if not (first and second) or (len(first) not in (1, len(second))):
        raise invalid(f"{name} must hold one text, or as many as {other}", name)
    return name, first, second


async def rerank(service: Service, exchange: Exchange, request: RerankRequest) -> None:
    """Answers with the documents, those that score highest with the query first."""
    documents = [_document(document, i) for i, document in enumerate(request.documents)]
    if not documents:
        raise invalid("documents must not be empty", "documents")
    if request.top_n < 0:
        raise invalid(f"top_n must not be negative, got {request.top_n}", "top_n")
    pooler = Pooler(service, f"rerank-{exchange.request_id}", "documents", request)
    scores = await pooler.scores([request.query], documents)
    ranked = [
        RankedDocument(
            index=i,
            document={"text": documents[i]} if request.return_documents else None,
            relevance_score=value,
        )
        for i, value in enumerate(scores)
    ]
    ranked.sort(key=lambda found: (-found.relevance_score, found.index))
    ranked = ranked[: request.top_n or len(ranked)]
    await exchange.json(
        RerankAnswer(id=pooler.name, model=service.served_name, usage=pooler.usage(), results=ranked)
    )


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The texts of a request; one list of numbers is one text."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("input must not be empty", "input")
    numbers = [item for item in given if isinstance(item, int)]
    if len(numbers) == len(given):
        return [numbers]
    if numbers:
        raise invalid("input must be a text, token ids, a list of texts or a list of token ids", "input")
    return [item for item in given if not isinstance(item, int)]


def _document(given: str | dict[str, Any], index: int) -> str:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise invalid(f"documents[{index}] must be a text or an object with a text", f"documents[{index}]")
    return text


def _shown(vector: Vector, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _form(asked: str | None) -> str:
    form = asked or "float"
    if form not in ("float", "base64"):
        raise invalid(f"encoding_format must be float or base64, got {form[:40]!r}", "encoding_format")
    return form


def _check_dimensions(facts: ModelFacts, dimensions: int | None) -> None:
    """Refuses wrong dimensions before any work."""
    if facts.embedding_size is not None:
        shorten(np.zeros(facts.embedding_size, np.float32), dimensions)
