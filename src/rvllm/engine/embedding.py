"""Texts on their way through an encoder: whole texts share a step, and nothing of them is kept."""

from __future__ import annotations

import time
from operator import attrgetter

import numpy as np

from rvllm.backends.base import Encoder, Limits, StepBatch
from rvllm.engine.ipc.messages import Embed, Output


class EmbeddingQueue:
    """Texts that wait, in order of (priority, arrival), and the steps that compute them.

    encoder: None where the model generates, and no text may be added.
    """

    def __init__(self, encoder: Encoder | None) -> None:
        self.steps = 0
        self.tokens = 0  # computed so far
        self.encoder = encoder
        self._waiting: dict[str, Embed] = {}  # by request id, in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: Embed) -> None:
        """Queues a text that fits into a step (see `EngineCore.add_embed`)."""
        self._waiting[request.request_id] = request

    def abort(self, request_id: str) -> bool:
        """Forgets a text; False when it is not waiting."""
        return self._waiting.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        """Computes the first texts that fit into one step, one Output each."""
        encoder = self.encoder
        assert encoder is not None, "a model that generates was given a text"
        now = time.time()
        requests = self._take(encoder.limits)
        lengths = np.array([len(r.prompt_token_ids) for r in requests], dtype=np.int32)
        nothing = np.zeros(len(requests), dtype=np.int32)
        batch = StepBatch(
            step=self.steps,
            slots=np.arange(len(requests), dtype=np.int32),
            query_lens=lengths,
            starts=nothing,
            tokens=np.concatenate([np.array(r.prompt_token_ids, dtype=np.int32) for r in requests]),
            sample=nothing.astype(np.bool_),
            seconds={s: r.second for s, r in enumerate(requests) if r.second is not None},
        )
        found = encoder.embed_tokens(batch) if requests[0].tokens else encoder.embed(batch)
        self.steps += 1
        self.tokens += int(lengths.sum())
        return [
            Output(
                request.request_id, [], finish_reason="stop", embedding=numbers.astype("<f4").tobytes(),
                queue_seconds=max(0.0, now - request.arrival) if request.arrival else 0.0,
            )
            for request, numbers in zip(requests, found, strict=True)
        ]  # fmt: skip

    def _take(self, limits: Limits) -> list[Embed]:
        """The first texts, as many as a step has room for, and at least one; all of them want the same."""
        taken: list[Embed] = []
        tokens = 0
        for request in sorted(self._waiting.values(), key=attrgetter("priority")):  # equals stay in order
            tokens += len(request.prompt_token_ids)
            full = len(taken) == limits.max_num_seqs or tokens > limits.max_num_batched_tokens
            if taken and (full or request.tokens != taken[0].tokens):
                break
            taken.append(request)
        for request in taken:
            del self._waiting[request.request_id]
        return taken
