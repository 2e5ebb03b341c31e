"""What models give that pool a text: classes and scores, and the pairs of texts that scores are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.messages import ModelFacts
from rvllm.errors import UsageError
from rvllm.text.embedding import (
    MAX_CHARS,
    PooledRequestOutput,
    PoolingParams,
    shorten,
    text_limit,
    text_tokens,
)
from rvllm.text.tokenizers.tokenizer import Tokenizer

F32 = NDArray[np.float32]
Pair = tuple[str, str]


@dataclass(slots=True)
class PoolingOutput:
    """What the model gives for a text, a vector or classes, float32 [width], or for its tokens [L, width]."""

    data: F32


class PoolingRequestOutput(PooledRequestOutput[PoolingOutput]):
    """A text with what the model gives for it."""


@dataclass(slots=True)
class ClassificationOutput:
    """A text's classes: how likely each of them is, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


class ClassificationRequestOutput(PooledRequestOutput[ClassificationOutput]):
    """A text with its classes."""


TASKS = ("embed", "classify", "token_embed", "token_classify")  # vLLM's names
MAX_NUMBERS = 1 << 25  # of one text's tokens: 128 MiB


def pooling_task(facts: ModelFacts, asked: str | None) -> str:
    """What is to be given for a text: `asked`, else what the model is for. Raises UsageError."""
    facts.check_pools()
    if asked is None:
        return (
            "embed" if facts.labels is None else "token_classify" if facts.classifies_tokens else "classify"
        )
    if asked not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {asked[:40]!r}")
    if asked == "classify":
        check_classes(facts)
    elif asked == "token_classify" and facts.labels is None:
        raise UsageError(f"{facts.architecture} gives vectors and no classes: use token_embed")
    elif asked.endswith("embed") and facts.labels is not None:
        raise UsageError(f"{facts.architecture} gives classes and no vectors: use {asked[:-5]}classify")
    return asked


def of_tokens(task: str) -> bool:
    """Whether a task gives numbers of each token."""
    return task.startswith("token_")


def check_numbers(tokens: int, facts: ModelFacts, most: int = MAX_NUMBERS) -> None:
    """Raises UsageError where the numbers of so many tokens are more than `most`."""
    width = facts.embedding_size or 0
    if tokens * width > most:
        raise UsageError(
            f"{tokens} tokens of {width} numbers each are {tokens * width} numbers, and one answer holds "
            f"{most}: give fewer or shorter texts, or set truncate_prompt_tokens"
        )


def given(task: str, numbers: F32, facts: ModelFacts, params: PoolingParams) -> F32:
    """What a task gives, from what the model does: of a text [N], of its tokens [L, N].

    Vectors of tokens have length 1 whatever the model's files say, unless `use_activation` is False, as in
    vLLM. Raises UsageError for more dimensions than there are.
    """
    if task == "embed":
        return shorten(numbers, params.dimensions)
    if task != "token_embed":
        return probabilities(numbers, facts, params.use_activation)
    shorten(numbers[0], params.dimensions)
    rows = numbers[:, : params.dimensions]
    if params.use_activation is False:
        return rows
    lengths = np.sqrt(np.vecdot(rows, rows))
    return np.asarray(rows / np.maximum(lengths, np.float32(1e-12))[:, None], dtype=np.float32)


def probabilities(numbers: F32, facts: ModelFacts, use_activation: bool | None = None) -> F32:
    """A classifier's numbers [..., N] as probabilities, by the model's own function, if it is wanted."""
    if use_activation is False or facts.activation == "identity":
        return numbers
    if facts.activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * numbers)), dtype=np.float32)
    powers = np.exp(numbers - numbers.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float32)


def check_classes(facts: ModelFacts) -> list[str]:
    """The classes of texts. Raises UsageError for a model that has none."""
    if facts.labels is None:
        what = "vectors" if facts.embedding_size is not None else "text"
        raise UsageError(f"{facts.architecture} gives {what} and no classes")
    if facts.classifies_tokens:
        raise UsageError(
            f"{facts.architecture} gives classes of tokens and none of texts: use the task token_classify"
        )
    return facts.labels


def gives_scores(facts: ModelFacts) -> bool:
    """Whether the model reads pairs of texts (a cross-encoder); else scores are cosines of its vectors.

    Raises UsageError for a classifier of more than one class.
    """
    if facts.labels is not None:
        check_classes(facts)
    if facts.labels is not None and len(facts.labels) != 1:
        raise UsageError(f"scores are of models with one class; {facts.architecture} has {len(facts.labels)}")
    return facts.labels is not None


def pair_tokens(
    tokenizer: Tokenizer | None, pair: Sequence[str], facts: ModelFacts, truncate: int | None = None
) -> tuple[list[int], int | None]:
    """(token ids, index of the second text's first token or None) of a pair for a cross-encoder.

    Encoders have their marks between the texts, decoders read one behind the other, as vLLM has it.
    truncate: as in `text_tokens`; the longer text is cut first. Raises UsageError as it does.
    """
    first, second = pair
    if tokenizer is None:
        raise UsageError("pairs of texts need a tokenizer: the model was loaded with skip_tokenizer_init")
    if facts.joins_pairs:
        return text_tokens(first + second, tokenizer, facts, truncate)[1], None
    limit = text_limit(facts, truncate)
    if max(len(first), len(second)) > MAX_CHARS:
        if truncate is None:
            raise facts.text_too_long(f"{len(first) + len(second)} characters")
        first, second = first[:MAX_CHARS], second[:MAX_CHARS]
    ids, begin = tokenizer.encode_pair(first, second, None if truncate is None else limit)
    facts.check_text(ids)
    return ids, begin


def cosine(left: F32, right: F32) -> float:
    """Of the angle between two vectors, -1 to 1."""
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.dot(left, right)) / max(scale, 1e-12)
