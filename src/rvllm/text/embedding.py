"""Texts for a model that pools, and their vectors as Python callers see them, in vLLM's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.messages import ModelFacts
from rvllm.errors import UsageError
from rvllm.text.requests import Prompt, prompt_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer

Pooled = TypeVar("Pooled")


@dataclass(slots=True)
class PoolingParams:
    """dimensions: keep so many of a vector's first elements (Kusupati et al. 2022); None keeps all.

    use_activation: False gives a classifier's own numbers instead of probabilities. normalize: vectors have
    length 1 where the model's files say so, which cannot be asked away. task: what `LLM.encode` is to give.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    task: str | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.normalize is False:
            raise UsageError("normalize=False is not supported: vectors are as the model's files say")

    def clone(self) -> PoolingParams:
        return replace(self)


@dataclass(slots=True)
class EmbeddingOutput:
    """A text's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class PooledRequestOutput(Generic[Pooled]):
    """A text, or a pair of texts, with what the model gives for it. prompt: None for token ids."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    finished: bool = True
    prompt: str | None = None
    num_cached_tokens: int = 0


class EmbeddingRequestOutput(PooledRequestOutput[EmbeddingOutput]):
    """A text with its vector."""


@dataclass(slots=True)
class ScoringOutput:
    """How alike two texts are."""

    score: float


class ScoringRequestOutput(PooledRequestOutput[ScoringOutput]):
    """A pair of texts with its score: a cross-encoder's, else the cosine of their vectors' angle."""


MAX_CHARS = 1_000_000  # of a text; where it is to be truncated, what lies behind them is not looked at


def text_tokens(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    facts: ModelFacts,
    truncate: int | None = None,
    prompt_name: str | None = None,
) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of a text to encode.

    truncate: the most tokens to keep, those that the model puts around a text included; -1: all it takes.
    prompt_name: which of the model's prompts goes before the text; None: its default one, if it has one.
    Raises UsageError when the model gives no embeddings, or the text is empty, too long or of another
    vocabulary.
    """
    facts.check_pools()
    limit = text_limit(facts, truncate)
    prompt = _prompted(prompt, facts, prompt_name)
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    given_ids = isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None
    if truncate is not None and isinstance(text, str) and tokenizer is not None and not given_ids:
        ids = tokenizer.encode_truncated(text[:MAX_CHARS], limit)
    else:
        if isinstance(text, str) and not given_ids and _hopeless(text, tokenizer, limit):
            raise facts.text_too_long(f"{len(text)} characters")
        text, ids = prompt_tokens(prompt, tokenizer)
        if truncate is not None:
            ids = ids[:limit]
    facts.check_text(ids)
    return (text if isinstance(text, str) else None), ids


def text_limit(facts: ModelFacts, truncate: int | None) -> int:
    """How many tokens a text may have, or is truncated to. Raises UsageError."""
    limit = facts.max_model_len
    if truncate in (None, -1):
        return limit
    if not 1 <= truncate <= limit:
        raise UsageError(f"truncate_prompt_tokens must be -1 or in [1, {limit}], got {truncate}")
    return truncate


def _prompted(prompt: Prompt, facts: ModelFacts, name: str | None) -> Prompt:
    """A text behind the model's prompt of that name, as sentence-transformers puts it there."""
    if name is not None and name not in facts.text_prompts:
        known = ", ".join(sorted(facts.text_prompts)) or "none"
        raise UsageError(f"prompt_name {name[:40]!r} is none of the model's prompts: {known}")
    name = facts.default_prompt if name is None else name
    if name is None or not isinstance(prompt, str):
        return prompt
    return facts.text_prompts[name] + prompt


def _hopeless(text: str, tokenizer: Tokenizer | None, limit: int) -> bool:
    """Whether a text is too long at sight; tokenising megabytes would take seconds and gigabytes."""
    return len(text) > MAX_CHARS or (tokenizer is not None and tokenizer.surely_reaches(text, limit + 1))


def shorten(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """A vector's first `dimensions` elements, brought back to length 1.

    Raises UsageError when the vector has fewer.
    """
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        raise UsageError(f"dimensions must be in [1, {len(vector)}], got {dimensions}")
    cut = vector[:dimensions]
    return cut / max(float(np.linalg.norm(cut)), 1e-12)
