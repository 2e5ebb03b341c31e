"""A backend whose tokens show whether the engine kept its books right.

The token drawn after position p is a hash of the tokens at positions 0 .. p as they stand in the paged
blocks, read through the slot's own block table. A block shared wrongly, lost, published too early or
handed out twice, a stale table or a wrong slot changes the history and so the tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence

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
    StepBatch,
    StepResult,
    TokenLogprobs,
)
from rvllm.engine.ipc.messages import ModelFacts
from rvllm.telemetry.stats import StepKernel, grouped

VOCAB = 97
EOS = 96


def next_token(
    history: Sequence[int], prompt_len: int, seed: int, min_tokens: int, stops: Sequence[int]
) -> int:
    """What the double draws after `history`; stop ids are not drawn before `min_tokens`."""
    index = len(history) - prompt_len
    key = np.asarray([*history, prompt_len, index, seed], dtype=np.int64).tobytes()
    token = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % VOCAB
    while index < min_tokens and token in stops:
        token = (token + 1) % VOCAB
    return token


def row_logprobs(history: Sequence[int], token: int, top: int) -> TokenLogprobs:
    """Made-up numbers that depend on the history and the token."""
    base = float(sum((i + 1) * t for i, t in enumerate(history)) % 1000 + token)
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
        blocks, slots = limits.num_blocks, limits.max_num_seqs
        width = -(-limits.max_model_len // limits.block_size) + 1
        self.cache = np.full((blocks, limits.block_size), -7, dtype=np.int32)
        self.host = np.full((limits.num_cpu_blocks, limits.block_size), -8, dtype=np.int32)
        self.tables = np.full((slots, width), -1, dtype=np.int32)
        self.starts: dict[int, object] = {}
        self.last = np.full(slots, -5, dtype=np.int32)
        self._pending: deque[StepResult] = deque()

    def ledger(self) -> list[LedgerLine]:
        return [LedgerLine("cache", self.cache.nbytes)]

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
            self.tables[start.slot] = -1
            self.starts[start.slot] = start
            self.last[start.slot] = -5
        for slot, index, block in batch.new_blocks.tolist():
            assert self.tables[slot, index] == -1, "a table entry set twice"
            self.tables[slot, index] = block
        result = StepResult(batch.step, np.full(len(batch.slots), -1, dtype=np.int32))
        rows = list(self._write(batch))  # all keys and values of a step before any of its attention
        for s, (slot, end) in enumerate(rows):
            self._draw(batch, result, s, slot, end)
        self._pending.append(result)
        return result

    def _check(self, batch: StepBatch) -> None:
        limits = self.limits
        assert 0 < len(batch.slots) <= limits.max_num_seqs
        assert len(set(batch.slots.tolist())) == len(batch.slots), "a slot twice in one step"
        assert batch.num_tokens == batch.query_lens.sum() <= limits.max_num_batched_tokens
        assert {a.dtype for a in (batch.slots, batch.query_lens, batch.starts, batch.tokens)} == {
            np.dtype("int32")
        }
        assert batch.query_lens.min() >= 1 and batch.sample.dtype == np.bool_
        single = batch.query_lens == 1
        chunks = np.flatnonzero(~single)
        assert not len(chunks) or single[: chunks[0]].all(), "decodes come first"

    def _move(self, batch: StepBatch) -> None:
        for kind, block, other in batch.moves.tolist():
            if kind == MOVE_OUT:
                self.host[other] = self.cache[block]
                self.cache[block] = -9  # nobody may read it here any more
            elif kind == MOVE_IN:
                self.cache[block] = self.host[other]
                self.host[other] = -10
            else:
                assert kind == COPY and self.limits.block_copies
                self.cache[other] = self.cache[block]

    def _write(self, batch: StepBatch):
        size, offset = self.limits.block_size, 0
        for slot, count, start in zip(
            batch.slots.tolist(), batch.query_lens.tolist(), batch.starts.tolist(), strict=True
        ):
            tokens = batch.tokens[offset : offset + count].copy()
            offset += count
            if (tokens == LAST_SAMPLED).any():
                assert count == 1 and self.last[slot] >= 0, "no token was sampled in this slot"
                tokens[:] = self.last[slot]
            assert start + count <= self.limits.max_model_len
            positions = np.arange(start, start + count)
            blocks = self.tables[slot, positions // size]
            assert (blocks >= 0).all(), "a position without a block"
            self.cache[blocks, positions % size] = tokens
            self.tokens_computed += count
            yield slot, start + count

    def history(self, slot: int, end: int) -> list[int]:
        size = self.limits.block_size
        table = self.tables[slot, : -(-end // size)]
        assert (table >= 0).all()
        return self.cache[table].reshape(-1)[:end].tolist()

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

    def _write(self, batch: StepBatch):
        rows = list(super()._write(batch))
        for (slot, end), start in zip(rows, batch.starts.tolist(), strict=True):
            state = [] if start == 0 else self.states[slot]
            assert state is not None and len(state) == start, "not the state that the step goes on from"
            blocks = self.tables[slot, np.arange(start, end) // self.limits.block_size]
            self.states[slot] = (
                state + self.cache[blocks, np.arange(start, end) % self.limits.block_size].tolist()
            )
        return rows

    def history(self, slot: int, end: int) -> list[int]:
        state = self.states[slot]
        assert state == super().history(slot, end)
        return state


class SleepingDouble(PagedDouble):
    """One whose blocks can be dropped."""

    room = True  # whether blocks can be kept

    def drop_caches(self, kept: Sequence[int] = ()) -> bool:
        if kept and not self.room:
            return False
        self.kept = {block: self.cache[block].copy() for block in kept}
        self.cache[:] = -9
        if not kept:
            self.host[:] = -9
        return True

    def take_caches(self) -> None:
        assert (self.cache == -9).all()
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
