"""`/v1/embeddings`, `/v1/score` and `/v1/rerank`: vectors of texts, and how alike texts are by them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.api.generate.generation import Service
from rvllm.api.generate.job import checked_priority
from rvllm.api.http.body import parse
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange, check_model
from rvllm.api.schemas.answers import now
from rvllm.api.schemas.embeddings import (
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    EmbeddingUsage,
    RankedDocument,
    RerankAnswer,
    RerankRequest,
    Score,
    ScoreAnswer,
    ScoreRequest,
)
from rvllm.engine.ipc.messages import Embed
from rvllm.errors import UsageError
from rvllm.text.embedding import shorten, text_tokens
from rvllm.text.worker import tasks

MAX_INPUTS = 2048  # OpenAI's limit for one request
AT_ONCE = 64  # texts of one request that are in the engine together

Vector = NDArray[np.float32]


async def embeddings(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answers with a vector for each text."""
    request = parse(body, EmbeddingRequest)
    check_model(request.model, service.served_names)
    form = request.encoding_format or "float"
    if form not in ("float", "base64"):
        raise invalid(f"encoding_format must be float or base64, got {form[:40]!r}", "encoding_format")
    size = service.ready.facts.embedding_size
    if size is not None:
        shorten(np.zeros(size, np.float32), request.dimensions)  # refuses wrong dimensions before any work
    encoder = _Encoder(service, f"embd-{exchange.request_id}", "input", request)
    vectors = await encoder.vectors(_inputs(request.input))
    data = [
        Embedding(index=i, embedding=_shown(shorten(vector, request.dimensions), form))
        for i, vector in enumerate(vectors)
    ]
    await exchange.json(EmbeddingAnswer(id=encoder.name, created=now(), model=service.served_name,
                                        data=data, usage=encoder.usage()))  # fmt: skip


async def score(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answers with the cosine similarity of each pair of texts."""
    request = parse(body, ScoreRequest)
    check_model(request.model, service.served_names)
    name, first, second = _sides(request)
    encoder = _Encoder(service, f"score-{exchange.request_id}", name, request)
    vectors = await encoder.vectors([*first, *second])
    left, right = vectors[: len(first)], vectors[len(first) :]
    data = [
        Score(index=i, score=_cosine(left[i if len(left) > 1 else 0], vector))
        for i, vector in enumerate(right)
    ]
    await exchange.json(ScoreAnswer(id=encoder.name, created=now(), model=service.served_name,
                                    data=data, usage=encoder.usage()))  # fmt: skip


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


async def rerank(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answers with the documents, those most like the query first."""
    request = parse(body, RerankRequest)
    check_model(request.model, service.served_names)
    documents = [_document(document, i) for i, document in enumerate(request.documents)]
    if not documents:
        raise invalid("documents must not be empty", "documents")
    if request.top_n < 0:
        raise invalid(f"top_n must not be negative, got {request.top_n}", "top_n")
    encoder = _Encoder(service, f"rerank-{exchange.request_id}", "documents", request)
    query, *vectors = await encoder.vectors([request.query, *documents])
    ranked = [
        RankedDocument(
            index=i,
            document={"text": documents[i]} if request.return_documents else None,
            relevance_score=_cosine(query, vector),
        )
        for i, vector in enumerate(vectors)
    ]
    ranked.sort(key=lambda found: (-found.relevance_score, found.index))
    ranked = ranked[: request.top_n or len(ranked)]
    await exchange.json(
        RerankAnswer(id=encoder.name, model=service.served_name, usage=encoder.usage(), results=ranked)
    )


class _Encoder:
    """Takes one request's texts through the engine, a bounded number of them at a time."""

    def __init__(
        self,
        service: Service,
        name: str,
        param: str,
        request: EmbeddingRequest | ScoreRequest | RerankRequest,
    ) -> None:
        self._service, self.name, self._param = service, name, param
        self._truncate = request.truncate_prompt_tokens
        self._priority = checked_priority(request.priority, service.ready.scheduling_policy)
        self._tokens = 0

    def usage(self) -> EmbeddingUsage:
        """Tokens of the texts taken so far."""
        return EmbeddingUsage(self._tokens, self._tokens)

    async def vectors(self, texts: Sequence[str | list[int]]) -> list[Vector]:
        """Vectors in the order of the texts. Raises UsageError for a text that cannot be encoded."""
        if len(texts) > MAX_INPUTS:
            raise invalid(f"{self._param}: at most {MAX_INPUTS} texts in one request", self._param)
        service = self._service
        prompts = []
        for text in texts:
            ids = await self._ids(text)
            self._tokens += len(ids)
            prompts.append(ids)
        with service.admitted(1):
            return await self._through_the_engine(prompts)

    async def _ids(self, text: str | list[int]) -> list[int]:
        service, facts = self._service, self._service.ready.facts
        try:
            if isinstance(text, str) and service.has_tokenizer:
                return await service.work.run(
                    tasks.embedding_tokens, self._param, len(text), text, facts, self._truncate
                )
            prompt = text if isinstance(text, str) else {"prompt_token_ids": text}
            return text_tokens(prompt, None, facts, self._truncate)[1]
        except UsageError as error:
            named = str(error).startswith("truncate_prompt_tokens")
            raise invalid(str(error), "truncate_prompt_tokens" if named else self._param) from None

    async def _through_the_engine(self, prompts: Sequence[list[int]]) -> list[Vector]:
        found: dict[int, Vector] = {}
        waiting = iter(enumerate(prompts))

        async def work() -> None:
            for index, ids in waiting:
                request = Embed(f"{self.name}-{index}", ids, self._priority, time.time())
                found[index] = await self._service.engine.embed(request)

        tasks = [asyncio.ensure_future(work()) for _ in range(min(AT_ONCE, len(prompts)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [found[i] for i in range(len(prompts))]


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


def _shown(vector: Vector, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _cosine(left: Vector, right: Vector) -> float:
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.dot(left, right)) / max(scale, 1e-12)


def refuse_encoder(service: Service) -> None:
    """Raises a 400 when the model is an encoder, which generates nothing."""
    facts = service.ready.facts
    if facts.embedding_size is not None:
        raise invalid(f"{facts.architecture} gives embeddings and generates no text: use /v1/embeddings")
