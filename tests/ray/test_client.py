"""What a client sees when the replica that answers is lost, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rvllm.backends.base import Limits
from rvllm.engine.ipc.messages import Generate, ModelFacts, Output, Ready, Sampling, SequenceState, State
from rvllm.errors import EngineDeadError, UnavailableError
from rvllm.ray import client
from rvllm.ray.client import ReplicatedEngine, current_session, merged_state, merged_stats
from rvllm.telemetry.stats import Stats

TOKENS = list(range(100, 110))


class LostError(Exception):
    pass


class BusyError(Exception):
    pass


class Stream:
    def __init__(self, outputs: AsyncIterator[list[Output]]) -> None:
        self._outputs, self.cancelled = outputs, False

    def __aiter__(self) -> AsyncIterator[list[Output]]:
        return self._outputs

    def cancel(self) -> None:
        self.cancelled = True


Plan = tuple[list[int], int | None]


class Replicas:
    """Each attempt is answered by the next of `plans`: (tokens, tokens until it is lost or None)."""

    def __init__(
        self, *plans: tuple[list[int], int | None], error: Callable[[], Exception] = LostError
    ) -> None:
        self.plans, self.error = list(plans), error
        self.names: list[str] = []
        self.sessions: list[str | None] = []
        self.streams: list[Stream] = []
        self.answers: list[Any] = []

    def stream(self, request: Any, session: str | None) -> Stream:
        self.names.append(request.request_id)
        self.sessions.append(session)
        self.streams.append(Stream(self._answer(request.request_id, *self.plans.pop(0))))
        return self.streams[-1]

    async def _answer(self, name: str, tokens: list[int], until: int | None) -> AsyncIterator[list[Output]]:
        for i, token in enumerate(tokens):
            if i == until:
                raise self.error()
            await asyncio.sleep(0)
            last = i == len(tokens) - 1
            yield [Output(name, [token], cached_tokens=7, finish_reason="length" if last else None)]
        if until == len(tokens):
            raise self.error()

    async def ask_all(self, method: str) -> list[Any]:
        return self.answers

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, LostError)

    def refusal(self, error: BaseException) -> str | None:
        return "too many wait" if isinstance(error, BusyError) else None


READY = Ready(
    backend="cpu", load_seconds=0.0, ledger=[],
    limits=Limits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=100, block_size=16, num_blocks=10,
                  pipeline_depth=1),
    facts=ModelFacts(architecture="x", model_path="", vocab_size=100, max_model_len=100),
)  # fmt: skip


def ask(replicas: Replicas, replays: int = 2) -> list[Output]:
    async def run() -> list[Output]:
        engine = ReplicatedEngine(replicas, READY, replays)
        try:
            request = Generate("r", [1, 2, 3], Sampling(max_tokens=10))
            return [output async for output in engine.generate(request)]
        finally:
            engine.close()

    return asyncio.run(run())


def tokens_of(outputs: list[Output]) -> list[int]:
    assert {output.request_id for output in outputs} == {"r"}
    assert [output.finish_reason for output in outputs][-1] == "length"
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("first", range(10))
@pytest.mark.parametrize("second", [None, 0, 3, 9])
def test_a_stream_outlives_its_replica(first: int, second: int | None) -> None:
    replicas = Replicas((TOKENS, first), (TOKENS, second), (TOKENS, None))
    assert tokens_of(ask(replicas)) == TOKENS
    assert replicas.names == ["r", "r.1", "r.2"][: len(replicas.names)]
    assert len(replicas.names) == (2 if second is None else 3)
    assert [stream.cancelled for stream in replicas.streams][-1] is False


def test_other_tokens_are_not_mixed_in() -> None:
    other = [*TOKENS[:2], 5, *TOKENS[3:]]
    with pytest.raises(EngineDeadError, match="tokens differ"):
        ask(Replicas((TOKENS, 4), (other, None)))


def test_an_answer_that_ends_before_what_the_client_has_is_none() -> None:
    with pytest.raises(EngineDeadError, match="successor's answer is shorter"):
        ask(Replicas((TOKENS, 6), (TOKENS[:4], None)))


def test_a_request_that_ends_every_replica_is_given_up() -> None:
    replicas = Replicas((TOKENS, 1), (TOKENS, 1), (TOKENS, 1))
    with pytest.raises(EngineDeadError, match="each that took over"):
        ask(replicas)
    assert replicas.plans == []


def test_no_replays_when_none_are_wanted() -> None:
    with pytest.raises(EngineDeadError):
        ask(Replicas((TOKENS, 1)), replays=0)


def test_a_full_queue_is_a_503_and_other_errors_tell_no_traceback() -> None:
    with pytest.raises(UnavailableError, match="too many wait"):
        ask(Replicas((TOKENS, 0), error=BusyError))
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        ask(Replicas((TOKENS, 3), error=ZeroDivisionError))


def test_logprobs_and_lists_of_several_tokens_are_cut_where_the_client_is() -> None:
    class Several(Replicas):
        async def _answer(
            self, name: str, tokens: list[int], until: int | None
        ) -> AsyncIterator[list[Output]]:
            if until is not None:
                yield [Output(name, tokens[:until], logprobs=list(tokens[:until]))]  # type: ignore[arg-type]
                raise LostError
            yield [Output(name, tokens, logprobs=list(tokens), finish_reason="length")]  # type: ignore[arg-type]

    outputs = ask(Several((TOKENS, 4), (TOKENS, None)))
    assert tokens_of(outputs) == TOKENS
    assert [entry for output in outputs for entry in output.logprobs or []] == TOKENS


async def test_leaving_early_cancels_the_stream() -> None:
    replicas = Replicas((TOKENS, None))
    engine = ReplicatedEngine(replicas, READY, 2)
    current_session.set("s")
    outputs = engine.generate(Generate("r", [1], Sampling(max_tokens=10)))
    async for _ in outputs:
        break
    await outputs.aclose()
    engine.close()
    assert replicas.streams[0].cancelled
    assert replicas.sessions == ["s"]


def test_figures_of_all_replicas_are_added_up() -> None:
    a = Stats(running=1, blocks_total=10, finished={"stop": 2}, step_counts=[1, 2], mask_p99_seconds=0.5,
              floor_ratio=0.5, backend={"x": 1.0})  # fmt: skip
    b = Stats(
        running=3, blocks_total=10, finished={"stop": 1, "abort": 1}, step_counts=[], mask_p99_seconds=0.1
    )
    assert merged_stats([a]).finished == {"stop": 2}
    total = merged_stats([a, b])
    assert (total.running, total.blocks_total, total.finished) == (4, 20, {"stop": 3, "abort": 1})
    assert (total.step_counts, total.mask_p99_seconds, total.floor_ratio) == ([1, 2], 0.5, 0.5)
    assert total.backend == {"x": 1.0}
    sequence = SequenceState("r", True, 1, 1, 1, 1, 0, 0.0, 0.0, [4, 5])
    state = merged_state([State(stats=a, sequences=[sequence]), State(stats=b)])
    assert state.stats.running == 4
    assert state.sequences[0].blocks == []


async def test_no_answer_is_unavailable() -> None:
    engine = ReplicatedEngine(Replicas(), READY, 2)
    with pytest.raises(UnavailableError):
        await engine.stats()
    assert (engine.alive, engine.status) == (True, "ready")
    engine.close()


async def test_a_replica_that_hangs_does_not_end_the_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(client, "QUESTION_SECONDS", 0.01)

    class Hanging(Replicas):
        looks = 0

        async def ask_all(self, method: str) -> list[Any]:
            Hanging.looks += 1
            if Hanging.looks < 3:
                await asyncio.sleep(600)
            return []

    engine, seen = ReplicatedEngine(Hanging(), READY, 0), []
    while engine.status == "ready" or not seen:
        seen.append(engine.status)
        await asyncio.sleep(0.005)
    engine.close()
    assert set(seen) == {"ready"} and Hanging.looks >= 3
