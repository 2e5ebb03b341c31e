"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rvllm.backends import opening
from rvllm.backends.base import (
    BROKEN_ROW,
    Backend,
    Droppable,
    Encoder,
    Generator,
    Limits,
    Preparable,
    Progress,
    StepResult,
    TokenLogprobs,
    Traceable,
)
from rvllm.engine.embedding import EmbeddingQueue
from rvllm.engine.grammar import Grammars
from rvllm.engine.ipc.messages import Embed, Generate, ModelFacts, Output, Ready
from rvllm.engine.scheduler import Scheduler
from rvllm.engine.sequence import Sequence
from rvllm.engine.stats import EngineStats
from rvllm.engine.step import Step
from rvllm.engine.token_filter import TokenFilter
from rvllm.errors import CapacityError, UsageError
from rvllm.telemetry.stats import Stats
from rvllm.telemetry.step_trace import StepTrace

if TYPE_CHECKING:
    from rvllm.config import EngineConfig
    from rvllm.engine.kv_events import KvEvents, Publisher


BROKEN = "the model's logits are infinite or no numbers: its weights may be damaged (--check-weights)"

QUEUE_LOOK = 0.1  # seconds between looks for requests that have waited too long


def same_limits(config: EngineConfig, limits: Limits) -> EngineConfig:
    """The settings with which a model is loaded again as it was, whatever memory is free by then."""
    same = replace(config, max_model_len=limits.max_model_len)
    if not limits.num_blocks:
        return same
    room = config.kv_cache_memory_gb if not limits.prefix_reuse else None  # it bounds states, too
    return replace(same, num_blocks=limits.num_blocks, kv_cache_memory_gb=room)


class EngineCore:
    """Schedules requests on a backend. Not thread-safe; one thread owns it.

    Up to `limits.pipeline_depth` steps are in flight: with 2, a step is launched before the tokens of the
    one before it are read. How long an output may get is known beforehand, so no step is launched for a
    token beyond it; a stop token is seen one step late, and the token drawn after it is dropped.
    """

    def __init__(
        self,
        backend: Generator | Encoder,
        facts: ModelFacts,
        config: EngineConfig,
        load_seconds: float = 0.0,
    ) -> None:
        limits = backend.limits
        if facts.embedding_size is None:  # a sequence that the whole pool cannot hold could never finish
            held = limits.num_blocks * limits.block_size
            limits = replace(limits, max_model_len=min(limits.max_model_len, held))
        self.backend: Backend = backend
        self.generator = backend if isinstance(backend, Generator) else None
        self.facts: ModelFacts = msgspec.structs.replace(facts, max_model_len=limits.max_model_len)
        self.counters = EngineStats()
        self.counted = self.counters.counted
        self.grammars = Grammars(facts.vocab_size, facts.eos_token_ids, self.counted)
        self.scheduler = Scheduler(limits, config, self.counted)
        self.ready = Ready(
            backend=backend.name,
            limits=limits,
            load_seconds=load_seconds,
            ledger=backend.ledger(),
            facts=self.facts,
            scheduling_policy=config.scheduling_policy,
            fairness=config.fairness,
            sleep_mode=config.enable_sleep_mode,
        )
        self.texts = EmbeddingQueue(backend if isinstance(backend, Encoder) else None)
        self._eos = frozenset(facts.eos_token_ids)
        self._depth = limits.pipeline_depth
        self._max_queue_seconds = config.max_queue_seconds
        self._looked_at_queue = 0.0
        self._in_flight: deque[Step] = deque()
        self.sleep_level = 0  # 0: awake, 1: without KV blocks, 2: without weights
        self._loaded = True  # whether the backend is still there
        self._load_again: Callable[[], Backend] | None = None
        self._alive: dict[str, Sequence] = {}
        self._outbox: list[Output] = []
        self._events: KvEvents | None = None
        self._publisher: Publisher | None = None
        if config.kv_events_config is not None:
            self._tell_routers(config)
        self._trace: StepTrace | None = None

    def _tell_routers(self, config: EngineConfig) -> None:
        """Publishes what happens to the prefix cache. Raises UsageError when there is none."""
        from rvllm.engine.kv_events import FLAG, KvEvents, Publisher, parse_config

        settings = parse_config(config.kv_events_config)
        if settings is None:
            return
        if not self.scheduler.blocks.caching:
            why = "this model shares no prefixes" if config.enable_prefix_caching else "it is switched off"
            raise UsageError(f"{FLAG} tells of the prefix cache (--enable-prefix-caching), and {why}")
        self._publisher = Publisher(settings)
        self._events = KvEvents(self._publisher.send, self.ready.limits.block_size)
        self.scheduler.events = self.scheduler.blocks.forgotten = self._events

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> EngineCore:
        """Finds and loads the configured model. Raises the RvllmError that says what is wrong with it."""
        opening.begin(config)
        from rvllm.engine.loading import Phases, load

        if config.kv_events_config is not None:  # a mistake there should not cost a whole load
            from rvllm.engine.kv_events import parse_config

            parse_config(config.kv_events_config)
        started, phases = time.perf_counter(), Phases(progress)
        trace = None if config.trace_steps is None else StepTrace(Path(config.trace_steps))
        try:
            backend, facts = load(config, phases.report)
        except BaseException:
            opening.abandon()
            raise
        core = cls(backend, facts, config, time.perf_counter() - started)
        core._trace = trace
        core.ready.phases = phases.ended()
        core._load_again = lambda: load(same_limits(config, backend.limits))[0]
        return core

    def add_request(self, request: Generate) -> None:
        """Queues a request; one that cannot be served ends with an "error" output in the next step.

        Raises UsageError when a living request has the same id.
        """
        if request.request_id in self._alive:
            raise UsageError(f"request_id {request.request_id!r} is in use by a request that has not ended")
        if self._refused(request.request_id, lambda: self._check(request)):
            return
        seq = Sequence(request, self.facts.max_model_len, self.ready.limits.block_size)
        self._alive[seq.request_id] = seq
        sampling = request.sampling
        if sampling.allowed_token_ids or sampling.bad_words:
            seq.filter = TokenFilter(self.facts.vocab_size, sampling.allowed_token_ids, sampling.bad_words)
        if request.sampling.grammar is None:
            self.scheduler.add(seq)
        else:
            self.grammars.begin(seq, request.sampling.grammar)

    def add_embed(self, request: Embed) -> None:
        """Queues a text; one that cannot be encoded ends with an "error" output in the next step.

        Raises UsageError when a text with the same id waits.
        """
        if request.request_id in self.texts:
            raise UsageError(f"request_id {request.request_id!r} is in use by a request that has not ended")
        if self._refused(request.request_id, lambda: self.facts.check_text(request.prompt_token_ids)):
            return
        self.texts.add(request)

    def _refused(self, name: str, check: Callable[[], None]) -> bool:
        """Whether a request cannot be served; its only output then says why."""
        try:
            check()
        except UsageError as error:
            self.counters.ended("error")
            self._outbox.append(Output(name, [], finish_reason="error", error=str(error)))
            return True
        return False

    def _check(self, request: Generate) -> None:
        self.facts.check_prompt(request.prompt_token_ids)
        if request.sampling.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {request.sampling.max_tokens}")

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests at once with an "abort" output; unknown ids are ignored."""
        for request_id in request_ids:
            seq = self._alive.get(request_id)
            if seq is not None:
                self._close(seq, "abort")
            elif self.texts.abort(request_id):
                self.counters.ended("abort")
                self._outbox.append(Output(request_id, [], finish_reason="abort"))

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to hand out; nothing is computed in sleep."""
        if self.sleep_level:
            return bool(self._outbox)
        return bool(self._alive or self._in_flight or self._outbox or self.texts)

    def step(self) -> list[Output]:
        """Launches a step; collects the oldest if the pipeline is full or nothing can be launched.

        An encoder's step takes texts that wait and hands out their vectors.
        """
        if self._max_queue_seconds and time.perf_counter() - self._looked_at_queue > QUEUE_LOOK:
            self._looked_at_queue = time.perf_counter()
            self._end_waits()
        if self.sleep_level:
            outputs, self._outbox = self._outbox, []
            return outputs
        if self.texts:
            computed = self.texts.step()
            self.counters.ended("stop", len(computed))
            self._outbox += computed
        began = time.perf_counter()
        self._follow_grammars()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        self.counted.host_seconds += scheduled - began
        generator = self.generator
        if step is not None:
            assert generator is not None, "an encoder was given tokens to draw"
            self.counters.launched(step)
            step.handle = generator.launch(step.batch)
            if self._trace is not None:
                self._trace_launch(self._trace, step, began, scheduled)
            self._in_flight.append(step)
        if self._in_flight and (step is None or len(self._in_flight) >= self._depth):
            self._collect()
        elif step is None and self._alive and not self._outbox and not self.grammars.wait():
            raise RuntimeError(f"no step can be scheduled for {len(self._alive)} requests")
        if self._events is not None:
            self._events.flush()
        outputs, self._outbox = self._outbox, []
        if self._trace is not None:
            self._trace.ended()
        return outputs

    def _trace_launch(self, trace: StepTrace, step: Step, began: float, scheduled: float) -> None:
        now = time.perf_counter()
        step.traced = traced = step.described()
        traced.running, traced.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        traced.alone = not self._in_flight
        trace.launched(traced, began, scheduled, now)

    def _trace_collect(
        self, trace: StepTrace, step: Step, waited: float, update: float, device: float
    ) -> None:
        traced = step.traced
        assert traced is not None
        traced.collect, traced.update, traced.device = waited, update, device
        if isinstance(self.backend, Traceable):
            self.backend.describe(step.handle, traced)
        trace.collected(traced)

    def _collect(self) -> None:
        """Waits for the oldest step in flight and books what it gave."""
        assert self.generator is not None
        oldest = self._in_flight.popleft()
        waiting = time.perf_counter()
        result = self.generator.collect(oldest.handle)
        self.counters.collected(oldest)
        began = time.perf_counter()
        self._update(oldest, result)
        update = time.perf_counter() - began
        self.counted.host_seconds += update
        if self._trace is not None:
            self._trace_collect(self._trace, oldest, began - waiting, update, result.device_seconds)

    def sleep(self, level: int = 1, keep_kv: bool = False) -> None:
        """Gives memory back until `wake_up`: KV blocks and, at level 2, the weights.

        At level 1 a backend that cannot give the one without the other gives both. Requests that run begin to
        wait, with the tokens that they have; new ones wait with them.

        keep_kv: at level 1 what KV blocks hold is kept in host memory: requests that run stop where they are,
        and the prefix cache stays. Raises UsageError where that cannot be had; nothing has happened then.
        """
        if self.sleep_level >= level:
            return
        while self._in_flight:
            self._collect()
        if keep_kv and self._keep_blocks(level):
            self.sleep_level = level
            return
        self.scheduler.suspend()
        droppable = self.backend if level == 1 and isinstance(self.backend, Droppable) else None
        keeps = self._loaded and droppable is not None and droppable.drop_caches()
        if self._loaded and not keeps:
            self.backend.close()
        self.sleep_level, self._loaded = level, keeps

    def _keep_blocks(self, level: int) -> bool:
        """Gives memory back but for what KV blocks hold; False when they hold nothing."""
        if level != 1:
            raise UsageError("kv_cache=keep is for level 1: at level 2 nothing of a model stays")
        blocks = self.scheduler.blocks.filled()
        if not blocks:
            return False
        if not isinstance(self.backend, Droppable) or not self.backend.drop_caches(blocks):
            raise UsageError(
                f"kv_cache=keep: the host has no room for weights and {len(blocks)} KV blocks, or this model "
                "cannot be moved there; sleep with kv_cache=drop"
            )
        return True

    def prepare(self) -> bool:
        """Uses some 10 ms for what later steps would wait for; False when nothing is left to prepare."""
        backend = self.backend
        return not self.sleep_level and isinstance(backend, Preparable) and backend.prepare()

    def wake_up(self) -> None:
        """Takes the memory again, loads what was given up, and goes on.

        Raises the RvllmError of a load, and UsageError where weights were kept and memory is lacking: it
        sleeps on then, and can be woken later.
        """
        if self.sleep_level and self._loaded:
            assert isinstance(self.backend, Droppable)
            try:
                self.backend.take_caches()
            except CapacityError as error:
                raise UsageError(f"{error}; the engine sleeps on") from None
        elif not self._loaded:
            assert self._load_again is not None
            limits, self.backend = self.backend.limits, self._load_again()
            if self.backend.limits != limits:
                raise CapacityError("the memory that the model had before it slept is not free any more")
            self.generator = self.backend if isinstance(self.backend, Generator) else None
            self.texts.encoder = self.backend if isinstance(self.backend, Encoder) else None
        self.sleep_level, self._loaded = 0, True

    def _end_waits(self) -> None:
        """Ends requests of which nothing was computed within --max-queue-seconds."""
        limit = self._max_queue_seconds
        for seq in self.scheduler.waiting_since(time.time() - limit):
            self._close(seq, "error", f"the request waited for {limit:g} s (--max-queue-seconds)")
            self._outbox[-1].waited_too_long = True

    def _follow_grammars(self) -> None:
        """Masks for the next step. Sequences whose grammars are compiled join the queue; those whose grammar
        is at its end or cannot be followed end."""
        for seq, error in self.grammars.settle(bool(self._in_flight)):
            self._ended_by_grammar(seq, error)
        for seq, outcome in self.grammars.ready():
            if isinstance(outcome, str):
                self._close(seq, "error", outcome)
            else:
                seq.matcher = outcome
                self.grammars.forget(seq)
                self.scheduler.add(seq)

    def _close(self, seq: Sequence, reason: str, error: str | None = None) -> None:
        """Ends a request with an Output that holds no token."""
        self._end(seq, reason)
        self._outbox.append(seq.ending(reason, error))

    def _update(self, step: Step, result: StepResult) -> None:
        """Books what a step computed and drew; parts of sequences that ended meanwhile are dropped."""
        batch, block_size = step.batch, self.ready.limits.block_size
        self.scheduler.cost.measured(result.device_seconds, step.decodes, batch.num_tokens - step.decodes)
        parts = zip(
            step.sequences,
            batch.query_lens.tolist(),
            batch.sample.tolist(),
            result.tokens.tolist(),
            strict=True,
        )
        for s, (seq, count, sampled, token) in enumerate(parts):
            seq.in_flight -= 1
            if seq.finish_reason is not None:
                continue
            if seq.slot >= 0:  # else it was preempted and holds no blocks; its token still counts
                seq.computed += count
                if seq.computed // block_size > seq.published:
                    self.scheduler.publish(seq)
            if s >= step.decodes:
                seq.computed_chunk(step.batch.step, count, step.launched_at)
            if s in result.prompt_logprobs:
                # Row i of a chunk judges the token behind it; what a preemption repeats is skipped.
                for position, row in enumerate(result.prompt_logprobs[s], int(batch.starts[s]) + 1):
                    if len(seq.prompt_logprobs) + 1 == position < seq.prompt_len:
                        seq.prompt_logprobs.append(row)
            if sampled and token == BROKEN_ROW:
                self.counted.broken_logits += 1
                self._close(seq, "error", BROKEN)
            elif sampled:
                self._emit(seq, token, result.logprobs.get(s))

    def _emit(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Appends a drawn token to its sequence and puts it into the outbox."""
        reason = seq.accept(token)
        output = Output(seq.request_id, [token], cached_tokens=seq.cached_tokens)
        if logprobs is not None:
            output.logprobs = [logprobs]
        if len(seq.tokens) == seq.prompt_len + 1:
            self.counted.prompt_tokens += seq.prompt_len
            output.queue_seconds = seq.queue_seconds()
            output.prefill = seq.chunks.copy()
            if seq.sampling.prompt_logprobs is not None:
                output.prompt_logprobs = seq.prompt_logprobs
        self.counted.generation_tokens += 1
        self._outbox.append(output)
        if seq.matcher is not None and reason != "stop":
            if seq.matcher.costly and reason is None:
                self.grammars.accept_beside(seq, token)
            elif self._ended_by_grammar(seq, self.grammars.accept(seq, token)):
                return
        if reason is not None:
            output.finish_reason = reason
            if reason == "stop" and token not in self._eos:
                output.stop_reason = token
            self._end(seq, reason)

    def _ended_by_grammar(self, seq: Sequence, error: str | None) -> bool:
        """Ends a sequence whose matcher has an error, or that nothing can follow: at once, without an EOS."""
        assert seq.matcher is not None
        if error is not None:
            self._close(seq, "error", error)
        elif seq.matcher.ended:
            self._close(seq, "stop")
        return seq.finish_reason is not None

    def _end(self, seq: Sequence, reason: str) -> None:
        if self.grammars.forget(seq):
            seq.finish_reason = reason
        else:
            self.scheduler.finish(seq, reason)
        del self._alive[seq.request_id]
        self.counters.ended(reason)

    def reset_prefix_cache(self, running: bool = False) -> None:
        """Forgets every prefix that no sequence holds; running: those that run are computed again, too."""
        if running:
            self.scheduler.preempt_all()
        self.scheduler.forget()
        if self._events is not None:
            self._events.flush()

    def stats(self) -> Stats:
        """Counters since the start and the state of this moment."""
        return self.counters.stats(self)

    def close(self) -> None:
        """Waits for the steps in flight and gives the backend back."""
        while self.generator and self._in_flight:
            self.generator.collect(self._in_flight.popleft().handle)
        self.grammars.close()
        if self._trace is not None:
            self._trace.close()
        if self._loaded:
            self.backend.close()
        if self._publisher is not None:
            self._publisher.close()
