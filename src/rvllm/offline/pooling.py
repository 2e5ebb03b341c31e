"""What `LLM` gives for whole texts: vectors, classes, scores of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.messages import Embed, ModelFacts
from rvllm.errors import UsageError
from rvllm.offline.arguments import pooling_list, prompt_list, refuse
from rvllm.text.embedding import PoolingParams, ScoringOutput, ScoringRequestOutput, shorten, text_tokens
from rvllm.text.pooling import (
    ClassificationOutput,
    ClassificationRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    check_classes,
    check_numbers,
    cosine,
    given,
    gives_scores,
    of_tokens,
    pair_tokens,
    pooling_task,
    probabilities,
)
from rvllm.text.requests import Prompt
from rvllm.text.tokenizers.tokenizer import Tokenizer

Params = PoolingParams | Sequence[PoolingParams] | None


class Pools(Protocol):
    """What is asked of an `LLM`."""

    @property
    def facts(self) -> ModelFacts:
        """What the loaded model is and can."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""

    def next_name(self) -> str:
        """A request id that no other request has."""

    def run_texts(self, texts: Sequence[Embed], show: bool) -> dict[str, NDArray[np.float32]]:
        """What the model gives for texts, by their request ids."""


@dataclass(frozen=True)
class Pooled:
    """How texts are to be taken. truncate: see `text_tokens`; more: vLLM's tokenization_kwargs."""

    truncate: int | None
    show: bool
    prompt_name: str | None
    more: Mapping[str, Any] | None

    def length(self, params: PoolingParams) -> int | None:
        """The most tokens of a text to keep, by whichever argument says so. Raises UsageError."""
        more = dict(self.more or {})
        if more.pop("truncation", None) and "max_length" not in more:
            more["truncate_prompt_tokens"] = more.get("truncate_prompt_tokens", -1)
        length = more.pop("max_length", None) or more.pop("truncate_prompt_tokens", None)
        refuse(tokenization_kwargs=more)
        given = self.truncate if params.truncate_prompt_tokens is None else params.truncate_prompt_tokens
        return length if given is None else given


@dataclass(frozen=True)
class Text:
    """A text on its way. prompt: None where token ids were given."""

    name: str
    prompt: str | None
    ids: list[int]
    params: PoolingParams


def check_vectors(facts: ModelFacts) -> None:
    """Raises UsageError for a model that gives classes."""
    if facts.labels is not None:
        raise UsageError(f"{facts.architecture} gives classes and no vectors: use classify, score or encode")


def pooled(
    llm: Pools, prompts: Prompt | Sequence[Prompt], params: Params, asked: Pooled, tokens: bool = False
) -> list[tuple[Text, NDArray[np.float32]]]:
    """What the model gives for each text, or for each of its tokens.

    Raises UsageError naming the text that is wrong.
    """
    facts, tokenizer, found = llm.facts, llm.tokenizer, list[Text]()
    items = prompt_list(prompts)
    for i, (item, wanted) in enumerate(zip(items, pooling_list(params, len(items)), strict=True)):
        try:
            text, ids = text_tokens(item, tokenizer, facts, asked.length(wanted), asked.prompt_name)
            shorten(np.zeros(facts.embedding_size or 0, np.float32), wanted.dimensions)
            if tokens:
                check_numbers(len(ids), facts)
        except UsageError as error:
            raise UsageError(f"prompts[{i}]: {error}" if len(items) > 1 else str(error)) from None
        found.append(Text(llm.next_name(), text, ids, wanted))
    numbers = llm.run_texts([Embed(text.name, text.ids, tokens=tokens) for text in found], asked.show)
    return [(text, numbers[text.name]) for text in found]


def encoded(
    llm: Pools, prompts: Prompt | Sequence[Prompt], params: Params, task: str | None, asked: Pooled
) -> list[PoolingRequestOutput]:
    """See `LLM.encode`."""
    facts = llm.facts
    one = params if isinstance(params, PoolingParams) else params[0] if params else PoolingParams()
    task = pooling_task(facts, task or one.task)
    return [
        PoolingRequestOutput(
            text.name, PoolingOutput(given(task, numbers, facts, text.params)), text.ids, prompt=text.prompt
        )
        for text, numbers in pooled(llm, prompts, params, asked, of_tokens(task))
    ]


def classified(
    llm: Pools, prompts: Prompt | Sequence[Prompt], params: Params, asked: Pooled
) -> list[ClassificationRequestOutput]:
    """See `LLM.classify`."""
    facts = llm.facts
    check_classes(facts)
    return [
        ClassificationRequestOutput(
            text.name,
            ClassificationOutput(probabilities(numbers, facts, text.params.use_activation).tolist()),
            text.ids,
            prompt=text.prompt,
        )
        for text, numbers in pooled(llm, prompts, params, asked)
    ]


def scores(
    llm: Pools, firsts: list[Prompt], seconds: list[Prompt], params: PoolingParams | None, asked: Pooled
) -> list[ScoringRequestOutput]:
    """See `LLM.score`."""
    if not seconds or len(firsts) not in (1, len(seconds)):
        raise UsageError(
            f"score takes one text against many or as many, got {len(firsts)} and {len(seconds)}"
        )
    facts, one = llm.facts, params or PoolingParams()
    if not gives_scores(facts):
        found = pooled(llm, [*firsts, *seconds], None, asked)
        ours, theirs = found[: len(firsts)], found[len(firsts) :]
        pairs = zip(ours * (len(theirs) if len(ours) == 1 else 1), theirs, strict=True)
        return [
            ScoringRequestOutput(other.name, ScoringOutput(cosine(left, right)), one.ids + other.ids)
            for (one, left), (other, right) in pairs
        ]
    texts = []
    for first, second in zip(firsts * (len(seconds) if len(firsts) == 1 else 1), seconds, strict=True):
        if not isinstance(first, str) or not isinstance(second, str):
            raise UsageError("a cross-encoder scores pairs of texts, not of token ids")
        ids, begin = pair_tokens((first, second), llm.tokenizer, facts, asked.length(one))
        texts.append(Embed(llm.next_name(), ids, second=begin))
    numbers = llm.run_texts(texts, asked.show)
    return [
        ScoringRequestOutput(
            text.request_id,
            ScoringOutput(float(probabilities(numbers[text.request_id], facts, one.use_activation)[0])),
            text.prompt_token_ids,
        )
        for text in texts
    ]
