"""What models give that pool a text: classes and scores, and the pairs of texts that scores are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.messages import ModelFacts
from rvllm.errors import UsageError
from rvllm.text.embedding import MAX_CHARS, PooledRequestOutput, text_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer

F32 = NDArray[np.float32]
Pair = tuple[str, str]


@dataclass(slots=True)
class PoolingOutput:
    """What the model gives for a text: a vector, or the numbers of its classes, float32 [width]."""

    data: F32


class PoolingRequestOutput(PooledRequestOutput[PoolingOutput]):
    """A text with what the model gives for it."""


@dataclass(slots=True)
class ClassificationOutput:
    """A text's classes: how likely each of them is, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.probs)


class ClassificationRequestOutput(PooledRequestOutput[ClassificationOutput]):
    """A text with its classes."""


def probabilities(numbers: F32, facts: ModelFacts, use_activation: bool | None = None) -> F32:
    """A classifier's numbers [N] as probabilities, by the model's own function, unless that is not wanted."""
    if use_activation is False or facts.activation == "identity":
        return numbers
    if facts.activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * numbers)), dtype=np.float32)
    powers = np.exp(numbers - numbers.max())
    return np.asarray(powers / powers.sum(), dtype=np.float32)


def check_classes(facts: ModelFacts) -> list[str]:
    """The model's labels. Raises UsageError where it has none."""
    if facts.labels is None:
        what = "vectors" if facts.embedding_size is not None else "text"
        raise UsageError(f"{facts.architecture} gives {what} and no classes")
    return facts.labels


def gives_scores(facts: ModelFacts) -> bool:
    """Whether the model reads pairs of texts (a cross-encoder); else scores are cosines of its vectors.

    Raises UsageError for a classifier of more than one class.
    """
    if facts.labels is not None and len(facts.labels) != 1:
        raise UsageError(f"scores are of models with one class; {facts.architecture} has {len(facts.labels)}")
    return facts.labels is not None


def pair_tokens(
    pair: Sequence[str], tokenizer: Tokenizer | None, facts: ModelFacts, truncate: int | None = None
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
    limit = facts.max_model_len
    if truncate is not None and truncate != -1:
        if not 1 <= truncate <= limit:
            raise UsageError(f"truncate_prompt_tokens must be -1 or in [1, {limit}], got {truncate}")
        limit = truncate
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
