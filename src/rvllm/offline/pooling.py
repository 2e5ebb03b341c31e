"""What `LLM` gives for whole texts: vectors, classes, scores of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Embed, embedded
from rvllm.errors import RvllmError, UsageError
from rvllm.offline.arguments import one_each, prompt_list, refuse
from rvllm.offline.progress import progress_bar
from rvllm.text.embedding import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    ScoringOutput,
    ScoringRequestOutput,
    shorten,
    text_tokens,
)
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
    probabilities,
)
from rvllm.text.pooling import (
    pooling_task as task_of,
)
from rvllm.text.requests import Prompt
from rvllm.text.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Asked:
    """How texts are to be taken. truncate: see `text_tokens`; more: vLLM's tokenization_kwargs."""

    truncate: int | None
    show: bool
    more: Mapping[str, Any] | None
    prompt_name: str | None = None

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
class _Text:
    """A text on its way. prompt: None where token ids were given."""

    name: str
    prompt: str | None
    ids: list[int]
    params: PoolingParams


class Pooling:
    """The methods of `LLM` for models that pool texts."""

    engine: EngineCore
    tokenizer: Tokenizer | None
    _counter: int

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt_name: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turns texts into vectors, in order.

        prompts: as in `generate`. truncate_prompt_tokens: the most tokens of a text to keep, -1 for as many
        as the model takes; None refuses longer texts. pooling_params: one for all, or one for each.
        prompt_name: which of the model's own prompts goes before each text.
        Raises UsageError naming the text or parameter that is wrong; nothing has run then.
        """
        refuse(lora_request=lora_request)
        facts = self.engine.facts
        if facts.labels is not None:
            raise UsageError(
                f"{facts.architecture} gives classes and no vectors: use classify, score or encode"
            )
        asked = _Asked(truncate_prompt_tokens, bool(use_tqdm), tokenization_kwargs, prompt_name)
        return [
            EmbeddingRequestOutput(
                text.name, EmbeddingOutput(shorten(numbers, text.params.dimensions).tolist()), text.ids,
                prompt=text.prompt,
            )
            for text, numbers in self._pooled(prompts, pooling_params, asked)
        ]  # fmt: skip

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """What the model gives for texts, as arrays: vectors (`embed`) or its classes (`classify`).

        Raises UsageError for a pooling_task that the model does not do, and as `embed` does.
        """
        refuse(lora_request=lora_request)
        asked = _Asked(truncate_prompt_tokens, bool(use_tqdm), tokenization_kwargs)
        facts, first = self.engine.facts, pooling_params
        if not isinstance(first, PoolingParams):
            first = first[0] if first else PoolingParams()
        task = task_of(facts, pooling_task or first.task)
        return [
            PoolingRequestOutput(
                text.name, PoolingOutput(given(task, numbers, facts, text.params)), text.ids,
                prompt=text.prompt,
            )
            for text, numbers in self._pooled(prompts, pooling_params, asked, of_tokens(task))
        ]  # fmt: skip

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """How likely each of the model's classes is for each text. Raises UsageError as `embed` does."""
        refuse(lora_request=lora_request)
        asked = _Asked(truncate_prompt_tokens, bool(use_tqdm), tokenization_kwargs)
        facts = self.engine.facts
        check_classes(facts)
        return [
            ClassificationRequestOutput(
                text.name,
                ClassificationOutput(probabilities(numbers, facts, text.params.use_activation).tolist()),
                text.ids,
                prompt=text.prompt,
            )
            for text, numbers in self._pooled(prompts, pooling_params, asked)
        ]

    def reward(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[PoolingRequestOutput]:
        """A reward model's own numbers for each text: its classes without softmax or sigmoid."""
        raw = PoolingParams(use_activation=False)
        return self.encode(
            prompts, options.pop("pooling_params", None) or raw, pooling_task="classify", **options
        )

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """The score of pairs of texts: a cross-encoder's, else the cosine of the vectors.

        One text against many, or pair by pair. Raises UsageError when the numbers of texts do not fit.
        """
        refuse(lora_request=lora_request)
        asked = _Asked(truncate_prompt_tokens, bool(use_tqdm), tokenization_kwargs)
        firsts, seconds = prompt_list(data_1), prompt_list(data_2)
        if not seconds or len(firsts) not in (1, len(seconds)):
            raise UsageError(
                f"score takes one text against many or as many, got {len(firsts)} and {len(seconds)}"
            )
        if not gives_scores(self.engine.facts):
            found = self._pooled([*firsts, *seconds], None, asked)
            ours, theirs = found[: len(firsts)], found[len(firsts) :]
            pairs = zip(ours * (len(theirs) if len(ours) == 1 else 1), theirs, strict=True)
            return [
                ScoringRequestOutput(other.name, ScoringOutput(cosine(left, right)), one.ids + other.ids)
                for (one, left), (other, right) in pairs
            ]
        return self._crossed(firsts, seconds, pooling_params or PoolingParams(), asked)

    def _pooled(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None,
        asked: _Asked,
        tokens: bool = False,
    ) -> list[tuple[_Text, NDArray[np.float32]]]:
        """What the model gives for each text, or for each of its tokens.

        Raises UsageError naming the text that is wrong.
        """
        facts, found = self.engine.facts, list[_Text]()
        items = prompt_list(prompts)
        each = one_each("pooling_params", params, PoolingParams, len(items), PoolingParams)
        for i, (item, wanted) in enumerate(zip(items, each, strict=True)):
            try:
                length = asked.length(wanted)
                text, ids = text_tokens(item, self.tokenizer, facts, length, asked.prompt_name)
                shorten(np.zeros(facts.embedding_size or 0, np.float32), wanted.dimensions)
                if tokens:
                    check_numbers(len(ids), facts)
            except UsageError as error:
                raise UsageError(f"prompts[{i}]: {error}" if len(items) > 1 else str(error)) from None
            found.append(_Text(self._next_name(), text, ids, wanted))
        numbers = self._run_texts([Embed(text.name, text.ids, tokens=tokens) for text in found], asked.show)
        return [(text, numbers[text.name]) for text in found]

    def _crossed(
        self, firsts: list[Prompt], seconds: list[Prompt], params: PoolingParams, asked: _Asked
    ) -> list[ScoringRequestOutput]:
        """A cross-encoder's scores."""
        facts, texts = self.engine.facts, list[Embed]()
        for first, second in zip(firsts * (len(seconds) if len(firsts) == 1 else 1), seconds, strict=True):
            if not isinstance(first, str) or not isinstance(second, str):
                raise UsageError("a cross-encoder scores pairs of texts, not of token ids")
            ids, begin = pair_tokens(self.tokenizer, (first, second), facts, asked.length(params))
            texts.append(Embed(self._next_name(), ids, second=begin))
        numbers = self._run_texts(texts, asked.show)
        return [
            ScoringRequestOutput(
                text.request_id,
                ScoringOutput(
                    float(probabilities(numbers[text.request_id], facts, params.use_activation)[0])
                ),
                text.prompt_token_ids,
            )
            for text in texts
        ]

    def _next_name(self) -> str:
        """A request id that no other request of this object has."""
        self._counter += 1
        return str(self._counter - 1)

    def _run_texts(self, texts: Sequence[Embed], show: bool) -> dict[str, NDArray[np.float32]]:
        """What the model gives for texts, by their request ids. Leaves none behind in the engine."""
        vectors: dict[str, NDArray[np.float32]] = {}
        asked = {text.request_id: text for text in texts}
        try:
            for text in texts:
                self.engine.add_embed(text)
            with progress_bar(len(texts), show) as advance:
                while len(vectors) < len(texts):
                    for output in self.engine.step():
                        if output.embedding is None:
                            raise RvllmError(f"request {output.request_id}: {output.error}")
                        vectors[output.request_id] = embedded(asked[output.request_id], output.embedding)
                        advance(len(asked[output.request_id].prompt_token_ids), True)
        finally:
            self.engine.abort([name for name in asked if name not in vectors])
            while self.engine.has_work():
                self.engine.step()
        return vectors
