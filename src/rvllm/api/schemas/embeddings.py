"""Bodies of `/v1/embeddings`, `/classify`, `/pooling`, `/v1/score` and `/v1/rerank`, and their answers."""

from __future__ import annotations

from typing import Any

import msgspec

from rvllm.api.schemas.answers import Envelope


class PooledRequest(msgspec.Struct, kw_only=True):
    """What every request to a model that pools has.

    truncate_prompt_tokens: keep so many tokens of a text, -1: as many as the model takes; without it a text
    that is too long is refused. prompt_name: which of the model's prompts goes before each text.
    """

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    prompt_name: str | None = None
    user: str | None = None


class EmbeddingRequest(PooledRequest, kw_only=True):
    """The body of `/v1/embeddings`. `input` is a text, token ids, or a list of either.

    dimensions: keep so many elements, brought back to length 1.
    """

    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str | None = None


class ClassifyRequest(PooledRequest, kw_only=True):
    """The body of `/classify`. use_activation: false gives the classifier's own numbers as `probs`."""

    input: str | list[str | int | list[int]]
    use_activation: bool | None = None


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """The body of `/pooling`. task: embed, classify, token_embed or token_classify; what the model is for, if
    it is left out.
    """

    task: str | None = None
    use_activation: bool | None = None


class ScoreRequest(PooledRequest, kw_only=True):
    """The body of `/v1/score`: texts against texts, one against many, or pair by pair.

    vLLM has three pairs of names for the two sides; one of them is given.
    """

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class RerankRequest(PooledRequest, kw_only=True):
    """The body of `/v1/rerank`. A document is a text or an object with a `text`; top_n 0: all of them."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int = 0
    return_documents: bool = True


class EmbeddingUsage(msgspec.Struct):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """A vector: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class PooledAnswer(Envelope, kw_only=True):
    """What every answer with an entry for each text has."""

    object: str = "list"
    usage: EmbeddingUsage


class EmbeddingAnswer(PooledAnswer, kw_only=True):
    """The answer of `/v1/embeddings`."""

    data: list[Embedding]


class Classes(msgspec.Struct, kw_only=True):
    """A text's classes: the likeliest one's name, and how likely each is."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyAnswer(PooledAnswer, kw_only=True):
    """The answer of `/classify`."""

    data: list[Classes]


class Pooled(msgspec.Struct, kw_only=True):
    """What the model gives for a text: numbers, or little-endian float32 in base64.

    Tasks of tokens have a list of them for each token, in base64 one behind the other.
    """

    index: int
    data: list[float | list[float]] | str
    object: str = "pooling"


class PoolingAnswer(PooledAnswer, kw_only=True):
    """The answer of `/pooling`."""

    data: list[Pooled]


class Score(msgspec.Struct, kw_only=True):
    """A pair's score: a cross-encoder's, else the cosine of the angle between the vectors, -1 to 1."""

    index: int
    object: str = "score"
    score: float


class ScoreAnswer(PooledAnswer, kw_only=True):
    """The answer of `/v1/score`."""

    data: list[Score]


class RankedDocument(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document with its score; `index` is its place in the request."""

    index: int
    document: dict[str, str] | None = None
    relevance_score: float


class RerankAnswer(msgspec.Struct, kw_only=True):
    """The answer of `/v1/rerank`, best document first."""

    id: str
    model: str
    usage: EmbeddingUsage
    results: list[RankedDocument]
