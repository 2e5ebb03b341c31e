"""A backend whose tokens show whether the engine kept its books right.

The token drawn after position p is a hash of the tokens at positions 0 .. p as they stand in the paged
blocks, read through the slot's own block table. A block shared wrongly, lost, published too early or
handed out twice, a stale table or a wrong slot changes the history and so the tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from rvllm.backends.base import (
    COPY,
    LAST_SAMPLED,
    MOVE_IN,
    MOVE_OUT,
    RESTORE,
    SAVE,
    LedgerLine,
    Limits,
    SlotStart,
    StepBatch,
    StepResult,
    TokenLogprobs,
)
from rvllm.engine.ipc.messages import ModelFacts
from rvllm.errors import CapacityError
from rvllm.telemetry.stats import StepKernel, grouped

VOCAB = 97
EOS = 96


def next_token(
    history: Sequence[int], prompt_len: int, seed: int, min_tokens: int, stops: Sequence[int]
) -> int:
    """What the double draws after `history`; stop ids are not drawn before `min_tokens`."""
    index = len(history) - prompt_len
    token = hash((*history, prompt_len, index, seed)) % VOCAB  # of integers: the same in every process
    while index < min_tokens and token in stops:
        token = (token + 1) % VOCAB
    return token


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request alone with seed 0 and no stop token gives."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, len(prompt), 0, 0, ()))
    return history[len(prompt) :]


def row_logprobs(history: Sequence[int], token: int, top: int) -> TokenLogprobs:
    """Made-up numbers that depend on the history and the token."""
    base = float(hash(tuple(history)) % 1000 + token)
    return TokenLogprobs(token, -base, token + 1, list(range(top)), [-base] * top)


class PagedDouble:
    """Implements the Backend protocol; steps run in launch order, as on a device's stream."""

    name = "double"

    def __init__(self, limits: Limits, step_seconds: float = 0.0, fail_at: int | None = None) -> None:
        self.limits = limits
        self.step_seconds = step_seconds
        self.fail_at = fail_at
        self.launches = 0
        self.tokens_computed = 0
        self.closed = False
        size, slots = limits.block_size, limits.max_num_seqs
        self._width = -(-limits.max_model_len // size) + 1
        # Lists: one token of one sequence is what most steps write, and arrays are slow at that.
        self.cache = [[-7] * size for _ in range(limits.num_blocks)]
        self.host = [[-8] * size for _ in range(limits.num_cpu_blocks)]
        self.tables = [[-1] * self._width for _ in range(slots)]
        self.starts: dict[int, SlotStart] = {}
        self.last = [-5] * slots
        self._pending: deque[StepResult] = deque()

    def ledger(self) -> list[LedgerLine]:
        return [LedgerLine("cache", 4 * self.limits.num_blocks * self.limits.block_size)]

    def stats(self) -> dict[str, float]:
        return {"launches": float(self.launches)}

    def last_kernels(self) -> list[StepKernel]:
        return grouped([("layers.0.hash", "blake2b", ""), ("layers.1.hash", "blake2b", "")])

    def decode_floor(self, seqs: int, context: int) -> float | None:
        return seqs * context * 1e-6

    def launch(self, batch: StepBatch) -> StepResult:
        if self.launches == self.fail_at:
            raise RuntimeError("the double was told to fail here")
        assert batch.step == self.launches
        self.launches += 1
        self._check(batch)
        self._move(batch)
        for start in batch.started:
            self.tables[start.slot] = [-1] * self._width
            self.starts[start.slot] = start
            self.last[start.slot] = -5
        for slot, index, block in batch.new_blocks.tolist():
            assert self.tables[slot][index] == -1, "a table entry set twice"
            self.tables[slot][index] = block
        result = StepResult(batch.step, np.full(len(batch.slots), -1, dtype=np.int32))
        rows = list(self._write(batch))  # all keys and values of a step before any of its attention
        sample = batch.sample.tolist()
        for s, (slot, end) in enumerate(rows):
            if sample[s] or s in batch.prompt_logprobs:
                self._draw(batch, result, s, slot, end)
        self._pending.append(result)
        return result

    def _check(self, batch: StepBatch) -> None:
        limits, slots, lens = self.limits, batch.slots.tolist(), batch.query_lens.tolist()
        assert 0 < len(slots) <= limits.max_num_seqs
        assert len(set(slots)) == len(slots), "a slot twice in one step"
        assert batch.num_tokens == sum(lens) <= limits.max_num_batched_tokens
        for array in (batch.slots, batch.query_lens, batch.starts, batch.tokens):
            assert array.dtype == np.int32
        assert min(lens) >= 1 and batch.sample.dtype == np.bool_
        after = batch.tokens.tolist()[next((s for s, count in enumerate(lens) if count > 1), len(lens)) :]
        assert LAST_SAMPLED not in after, "decodes come first"

    def _move(self, batch: StepBatch) -> None:
        size = self.limits.block_size
        for kind, block, other in batch.moves.tolist():
            if kind == MOVE_OUT:
                self.host[other] = self.cache[block]
                self.cache[block] = [-9] * size  # nobody may read it here any more
            elif kind == MOVE_IN:
                self.cache[block] = self.host[other]
                self.host[other] = [-10] * size
            else:
                assert kind == COPY and self.limits.block_copies
                self.cache[other] = self.cache[block].copy()

    def _write(self, batch: StepBatch) -> Iterator[tuple[int, int]]:
        size, offset, flat = self.limits.block_size, 0, batch.tokens.tolist()
        for slot, count, start in zip(
            batch.slots.tolist(), batch.query_lens.tolist(), batch.starts.tolist(), strict=True
        ):
            tokens, end = flat[offset : offset + count], start + count
            offset += count
            if LAST_SAMPLED in tokens:
                assert count == 1 and self.last[slot] >= 0, "no token was sampled in this slot"
                tokens = [self.last[slot]]
            assert end <= self.limits.max_model_len
            table, at = self.tables[slot], start
            while at < end:
                upto = min(end, at - at % size + size)
                assert table[at // size] >= 0, "a position without a block"
                row = self.cache[table[at // size]]
                row[at % size : at % size + upto - at] = tokens[at - start : upto - start]
                at = upto
            self.tokens_computed += count
            yield slot, end

    def history(self, slot: int, end: int) -> list[int]:
        found: list[int] = []
        for block in self.tables[slot][: -(-end // self.limits.block_size)]:
            assert block >= 0
            found += self.cache[block]
        return found[:end]

    def _draw(self, batch: StepBatch, result: StepResult, s: int, slot: int, end: int) -> None:
        start = self.starts[slot]
        spec = start.sampling
        history = self.history(slot, end)
        if s in batch.prompt_logprobs:
            known = start.tokens.tolist()
            first = int(batch.starts[s])
            result.prompt_logprobs[s] = [
                row_logprobs(history[: p + 1], known[p + 1], batch.prompt_logprobs[s])
                for p in range(first, min(end, len(known) - 1))
            ]
        if batch.sample[s]:
            token = next_token(history, start.prompt_len, spec.seed, spec.min_tokens, spec.stop_token_ids)
            self.last[slot] = result.tokens[s] = token
            if spec.logprobs is not None:
                result.logprobs[s] = row_logprobs(history, token, spec.logprobs)

    def collect(self, handle: StepResult) -> StepResult:
        assert handle is self._pending.popleft(), "collected out of order"
        if self.step_seconds:
            time.sleep(self.step_seconds)
        return handle

    def embed(self, batch: StepBatch) -> np.ndarray:
        raise AssertionError("the double embeds nothing")

    def close(self) -> None:
        self.closed = True


class RecurrentDouble(PagedDouble):
    """One whose slots carry a state: all tokens so far, and nothing else may go on from a prefix."""

    def __init__(self, limits: Limits, step_seconds: float = 0.0, fail_at: int | None = None) -> None:
        super().__init__(limits, step_seconds, fail_at)
        self.states: list[list[int] | None] = [None] * (limits.max_num_seqs + limits.num_snapshots)

    def _move(self, batch: StepBatch) -> None:
        assert not batch.moves_ahead
        for kind, slot, snapshot in batch.moves.tolist():
            kept = self.limits.max_num_seqs + snapshot
            target, source = (kept, slot) if kind == SAVE else (slot, kept)
            assert kind in (SAVE, RESTORE) and snapshot < self.limits.num_snapshots
            state = self.states[source]
            assert state and len(state) % self.limits.block_size == 0
            self.states[target] = state.copy()

    def _write(self, batch: StepBatch) -> Iterator[tuple[int, int]]:
        rows = list(super()._write(batch))
        for (slot, end), start in zip(rows, batch.starts.tolist(), strict=True):
            state = [] if start == 0 else self.states[slot]
            assert state is not None and len(state) == start, "not the state that the step goes on from"
            self.states[slot] = state + super().history(slot, end)[start:]
        yield from rows

    def history(self, slot: int, end: int) -> list[int]:
        state = self.states[slot]
        assert state == super().history(slot, end)
        return state


class SleepingDouble(PagedDouble):
    """One whose blocks can be dropped."""

    room = True  # whether blocks can be kept
    refusals = 0  # so many times there is no memory to wake up with

    def drop_caches(self, kept: Sequence[int] = ()) -> bool:
        if kept and not self.room:
            return False
        self.kept = {block: self.cache[block].copy() for block in kept}
        for row in self.cache if kept else (*self.cache, *self.host):
            row[:] = [-9] * len(row)
        return True

    def take_caches(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise CapacityError("no memory")
        assert all(set(row) == {-9} for row in self.cache)
        for block, values in self.kept.items():
            self.cache[block] = values


def facts(max_model_len: int = 128) -> ModelFacts:
    return ModelFacts(
        architecture="Double",
        model_path="",
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
    )
