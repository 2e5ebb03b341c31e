"""The engine of many replicas as the HTTP application sees it: one that streams, and outlives any of them.

A request whose replica is lost begins anew at another. The same request gives the same tokens in any batch
and on every replica, so what the client has already is compared token by token and passed over, and the
stream goes on. Where they differ (replicas of unlike hardware or versions), the client is told instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rvllm.engine.ipc.messages import Embed, Generate, Output, Ready, State, Vocabulary, embedding_of
from rvllm.errors import EngineDeadError, RvllmError, UnavailableError, UsageError
from rvllm.ray.fleet import HandleFleet
from rvllm.telemetry.stats import Stats

QUESTION_SECONDS = 5.0
LOOK_SECONDS = 2.0  # how often all replicas are asked how they are
current_session: ContextVar[str | None] = ContextVar("rvllm_session", default=None)
"""The session that the HTTP request in this context belongs to."""


class ReplicatedEngine:
    """Implements `rvllm.api.generate.generation.Engine`."""

    def __init__(self, fleet: HandleFleet, ready: Ready, replays: int) -> None:
        self.ready = ready
        self._fleet, self._replays = fleet, replays
        self._running = True
        self._looking = asyncio.ensure_future(self._look())

    @property
    def alive(self) -> bool:
        """Always: replicas that are lost are replaced."""
        return True

    @property
    def status(self) -> str:
        """ready, or starting while no replica answers."""
        return "ready" if self._running else "starting"

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                async with asyncio.timeout(QUESTION_SECONDS):
                    self._running = bool(await self._fleet.ask_all("ready"))
            except TimeoutError:
                continue  # one that hangs keeps the answers of all back, and says nothing of the others
            except Exception:  # whatever Ray raises when it has nobody to ask
                self._running = False

    def close(self) -> None:
        """Stops looking after the replicas."""
        self._looking.cancel()

    @property
    def sleep_level(self) -> int:
        """0: replicas do not sleep."""
        return 0

    async def sleep(self, level: int, keep_kv: bool = False) -> float:
        """Refused: replicas that are not needed are scaled away. Raises UsageError."""
        raise UsageError("replicas do not sleep; those that are not needed are scaled away")

    async def wait_dead(self) -> str:
        """Never returns."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Nothing: each replica reads its own before its first grammar."""

    async def generate(self, request: Generate | Embed) -> AsyncGenerator[Output, None]:
        """The request's outputs up to the one with a finish reason; closing it early aborts the request.

        Raises EngineDeadError when replicas were lost too often, or tokens differ.
        """
        session = current_session.get()
        given = _Given(request.request_id)
        for attempt in range(self._replays + 1):
            name = f"{request.request_id}.{attempt}" if attempt else request.request_id
            stream = self._fleet.stream(msgspec.structs.replace(request, request_id=name), session)
            finished = False
            given.restart()
            try:
                async for outputs in stream:
                    for output in outputs:
                        finished = finished or output.finish_reason is not None
                        if (new := given.rest_of(output)) is not None:
                            yield new
                    if finished:
                        return
            except Exception as error:
                self._refuse_unless_lost(error)
            finally:
                if not finished:
                    stream.cancel()
        raise EngineDeadError("the replica that answered was lost, and so was each that took over")

    def _refuse_unless_lost(self, error: Exception) -> None:
        """Raises the error in our words, without Ray's tracebacks, unless the request may begin anew."""
        if self._fleet.lost(error):
            return
        if (refusal := self._fleet.refusal(error)) is not None:
            raise UnavailableError(refusal) from None
        if isinstance(error, RvllmError):
            raise error
        raise EngineDeadError(f"the replica could not answer: {type(error).__name__}") from error

    async def embed(self, request: Embed) -> NDArray[np.float32]:
        """As `EngineClient.embed`. Raises UsageError when the text cannot be encoded."""
        return await embedding_of(request, self.generate(request))

    async def stats(self) -> Stats:
        """The figures of all replicas together."""
        return merged_stats(await self._all("stats"))

    async def state(self) -> State:
        """What all replicas are doing; block numbers are each replica's own and are left out."""
        return merged_state(await self._all("state"))

    async def _all(self, method: str) -> list[Any]:
        try:
            async with asyncio.timeout(QUESTION_SECONDS):
                answers = await self._fleet.ask_all(method)
        except TimeoutError:
            answers = []
        if not answers:
            raise UnavailableError("no replica has answered")
        return answers


class _Given:
    """What of an answer the client has."""

    def __init__(self, request_id: str) -> None:
        self._name = request_id
        self._tokens: list[int] = []
        self._again = 0  # tokens of the attempt under way
        self._began = False

    def restart(self) -> None:
        """Another attempt begins."""
        self._again = 0

    def rest_of(self, output: Output) -> Output | None:
        """The part of an output that the client does not have yet; None when it has all of it.

        Raises EngineDeadError when the attempt's tokens are others than those that the client has.
        """
        known = self._tokens[self._again : self._again + len(output.token_ids)]
        if known != output.token_ids[: len(known)]:
            raise EngineDeadError("the replica that answered was lost, and its successor's tokens differ")
        self._again += len(output.token_ids)
        if output.finish_reason not in (None, "error") and self._again < len(self._tokens):
            raise EngineDeadError("the replica that answered was lost, and its successor's answer is shorter")
        output.request_id = self._name
        new = output.token_ids[len(known) :]
        self._tokens += new
        if not new and output.finish_reason is None and output.embedding is None:
            return None
        if known:
            output.token_ids = new
            output.logprobs = output.logprobs[len(known) :] if output.logprobs is not None else None
        if self._began:  # told once, with the first tokens
            output.prompt_logprobs, output.prefill, output.queue_seconds = None, None, 0.0
        self._began = True
        return output


def merged_stats(stats: Sequence[Stats]) -> Stats:
    """Sums; of ratios and percentiles the mean and the largest."""
    total = msgspec.structs.replace(stats[0])
    for field in Stats.__struct_fields__:
        values = [getattr(one, field) for one in stats]
        if field == "floor_ratio":
            known = [value for value in values if value is not None]
            total.floor_ratio = sum(known) / len(known) if known else None
        elif field.endswith(("p50_seconds", "p99_seconds")):
            setattr(total, field, max(values))
        elif field == "step_counts":
            total.step_counts = [sum(column) for column in zip(*(v for v in values if v), strict=True)]
        elif isinstance(values[0], dict):
            setattr(total, field, {k: sum(v.get(k, 0) for v in values) for v in values for k in v})
        elif field != "kernels":
            setattr(total, field, sum(values))
    return total


def merged_state(states: Sequence[State]) -> State:
    """All sequences, without their blocks."""
    sequences = [
        msgspec.structs.replace(sequence, blocks=[]) for state in states for sequence in state.sequences
    ]
    return State(
        stats=merged_stats([state.stats for state in states]),
        sequences=sequences,
        cut=True,
        kernels=states[0].kernels,
    )
