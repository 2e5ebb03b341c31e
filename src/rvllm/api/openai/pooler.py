"""One request's texts on their way through the engine: for embeddings, classes, scores and ranks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.api.generate.generation import Service
from rvllm.api.generate.job import checked_priority
from rvllm.api.http.errors import blaming, invalid
from rvllm.api.schemas.answers import now
from rvllm.api.schemas.embeddings import EmbeddingUsage, PooledRequest
from rvllm.engine.ipc.messages import Embed
from rvllm.errors import UsageError
from rvllm.text.embedding import text_tokens
from rvllm.text.pooling import Pair, check_numbers, cosine, gives_scores, pair_tokens, probabilities
from rvllm.text.worker import tasks

MAX_INPUTS = 2048  # OpenAI's limit for one request
MAX_NUMBERS = 1 << 21  # of one answer: as many are 20 to 40 MB of JSON
AT_ONCE = 64  # texts of one request that are in the engine together

Vector = NDArray[np.float32]


class Pooler:
    """Takes one request's texts, or pairs of texts, through the engine, a few of them at a time."""

    def __init__(
        self,
        service: Service,
        name: str,
        param: str,
        request: PooledRequest,
        tokens: bool = False,
    ) -> None:
        """tokens: whether numbers of each token are wanted."""
        self._service, self.name, self._param = service, name, param
        self._truncate = request.truncate_prompt_tokens
        self._priority = checked_priority(request.priority, service.ready.scheduling_policy)
        self._prompt_name = request.prompt_name
        self._tokens, self._of_tokens = 0, tokens

    def usage(self) -> EmbeddingUsage:
        """Tokens of the texts taken so far."""
        return EmbeddingUsage(self._tokens, self._tokens)

    def about(self) -> dict[str, Any]:
        """What an answer begins and ends with, by its fields."""
        return {
            "id": self.name,
            "created": now(),
            "model": self._service.served_name,
            "usage": self.usage(),
        }

    async def vectors(self, texts: Sequence[str | list[int] | Pair]) -> list[Vector]:
        """What the model gives, in the order of the texts. Raises a 400 for one that cannot be encoded."""
        if len(texts) > MAX_INPUTS:
            raise invalid(f"{self._param}: at most {MAX_INPUTS} texts in one request", self._param)
        service = self._service
        prompts = []
        for text in texts:
            ids, second = await self._ids(text)
            self._tokens += len(ids)
            prompts.append((ids, second))
            if self._of_tokens:
                with blaming(self._param):
                    check_numbers(self._tokens, self._service.ready.facts, MAX_NUMBERS)
        with service.admitted(1):
            return await self._through_the_engine(prompts)

    async def _ids(self, text: str | list[int] | Pair) -> tuple[list[int], int | None]:
        """(token ids, where a pair's second text begins)."""
        service, facts, work = self._service, self._service.ready.facts, self._service.work
        try:
            if isinstance(text, tuple):
                if not service.has_tokenizer:
                    return pair_tokens(None, text, facts, self._truncate)
                size = len(text[0]) + len(text[1])
                return await work.run(pair_tokens, self._param, size, text, facts, self._truncate)
            options = facts, self._truncate, self._prompt_name
            if isinstance(text, str) and service.has_tokenizer:
                ids = await work.run(tasks.embedding_tokens, self._param, len(text), text, *options)
                return ids, None
            prompt = text if isinstance(text, str) else {"prompt_token_ids": text}
            return text_tokens(prompt, None, *options)[1], None
        except UsageError as error:
            named = next(
                (n for n in ("truncate_prompt_tokens", "prompt_name") if str(error).startswith(n)), None
            )
            raise invalid(str(error), named or self._param) from None

    async def _through_the_engine(self, prompts: Sequence[tuple[list[int], int | None]]) -> list[Vector]:
        found: dict[int, Vector] = {}
        waiting = iter(enumerate(prompts))

        async def work() -> None:
            for index, (ids, second) in waiting:
                name = f"{self.name}-{index}"
                request = Embed(name, ids, self._priority, time.time(), second, self._of_tokens)
                found[index] = await self._service.engine.embed(request)

        running = [asyncio.ensure_future(work()) for _ in range(min(AT_ONCE, len(prompts)))]
        try:
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [found[i] for i in range(len(prompts))]

    async def scores(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """The score of each pair; `first` holds one text, or as many as `second`.

        Of a model with one class its answer to the pair, of others the cosine of their vectors.
        """
        facts = self._service.ready.facts
        with blaming("model"):
            crossed = gives_scores(facts)
        if not crossed:
            vectors = await self.vectors([*first, *second])
            left, right = vectors[: len(first)], vectors[len(first) :]
            return [cosine(left[i if len(left) > 1 else 0], vector) for i, vector in enumerate(right)]
        pairs = [(first[i if len(first) > 1 else 0], text) for i, text in enumerate(second)]
        return [float(probabilities(numbers, facts)[0]) for numbers in await self.vectors(pairs)]
