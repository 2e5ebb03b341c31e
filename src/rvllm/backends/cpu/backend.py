"""The CPU backend: NumPy runs the program, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import BROKEN_ROW, KV_BLOCK, StepBatch, StepResult
from rvllm.backends.cpu.compiled.model import NativeModel
from rvllm.backends.cpu.loaded_model import LoadedModel
from rvllm.backends.cpu.measure import Rates, measure
from rvllm.backends.cpu.memory import MemoryPlan
from rvllm.backends.cpu.pools import Pools, drop_pages, trim_heap
from rvllm.backends.cpu.reference.encoder import ROWS
from rvllm.backends.cpu.reference.run import F32, Model, Run
from rvllm.backends.cpu.reference.sampler import draw
from rvllm.backends.cpu.slots import Slots, text_tables
from rvllm.backends.cpu.step import flat_step
from rvllm.backends.heads import classify_tokens
from rvllm.backends.logprobs import top_logprobs
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.ops.encoder import classifier


class CpuBackend(LoadedModel):
    """A program that draws tokens (see `rvllm.backends.base.Generator`)."""

    def __init__(self, model: Model, plan: MemoryPlan, native: NativeModel | None = None) -> None:
        super().__init__(model, plan, native)
        self._slots = Slots(plan.limits, model.program.vocab_size)
        limits = plan.limits
        self._pools = Pools(model.caches, limits.num_cpu_blocks, model.states, limits.max_num_seqs)
        self._rates: Rates | None = None

    def launch(self, batch: StepBatch) -> StepResult:
        """Runs the step; the handle is its result (pipeline depth 1)."""
        began = time.perf_counter()
        ends = np.cumsum(batch.query_lens, dtype=np.int64)
        sampled = np.flatnonzero(batch.sample)
        scored = [np.arange(ends[s] - batch.query_lens[s], ends[s]) for s in sorted(batch.prompt_logprobs)]
        logits = self.forward(batch, np.concatenate([ends[sampled] - 1, *scored]))
        result = StepResult(batch.step, np.full(len(batch.slots), -1, dtype=np.int32))
        self._score_prompts(batch, logits[len(sampled) :], result)
        self._draw(batch, sampled, logits[: len(sampled)], result)
        result.device_seconds = time.perf_counter() - began
        self._steps += 1
        self._busy += result.device_seconds
        return result

    def forward(self, batch: StepBatch, rows: NDArray[np.int64]) -> F32:
        """Runs the program and draws nothing: the logits [R, vocab] of these rows of the flat batch."""
        self._pools.move(batch.moves)
        fresh = self._slots.update(batch)
        if len(fresh):  # what another sequence left there must not meet a weight of zero as nan
            for cache in self._model.caches.values():
                for array in cache:
                    array[fresh] = 0
        run = Run(self._model, self._slots.step(batch, rows))
        self._execute(run)
        return run.buffers["logits"]

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def decode_floor(self, seqs: int, context: int) -> float:
        """Least seconds of a decode step; memory and arithmetic are timed when somebody first asks."""
        if self._rates is None:
            self._rates = measure(self._model.workers.count)
        shape = StepShape(seqs, 1, context)
        if self._native is not None:  # they compute on the stored form, at another rate than was timed
            cost = program_cost(self._model.program, shape, self._native.stored)
            return cost.nbytes / self._rates.bandwidth
        cost = program_cost(self._model.program, shape)
        return cost.floor_seconds(self._rates.bandwidth, self._rates.flops)

    def stats(self) -> dict[str, float]:
        """Steps run and the seconds that they and the moves of blocks took."""
        return {**super().stats(), "rvllm:kv_block_move_seconds_total": self._pools.seconds}

    def drop_caches(self, kept: Sequence[int] = ()) -> bool:
        """Gives the memory of both pools and of the states back to the system; see `Droppable`.

        Where anything is kept, nothing is given back: it lies in host memory already.
        """
        if kept:
            return True
        self._pools.drop()
        for state in self._model.states.values():
            drop_pages(state)
        return True

    def take_caches(self) -> None:
        """Nothing to do: pages come back when they are written."""

    def close(self) -> None:
        """Ends the threads and lets go of weights and caches."""
        super().close()
        self._pools.clear()
        self._native = None  # it holds packed weights and a step's workspace
        trim_heap()

    def _draw(self, batch: StepBatch, sampled: NDArray[np.int64], logits: F32, result: StepResult) -> None:
        def one(row: int) -> None:
            s = int(sampled[row])
            slot = int(batch.slots[s])
            history = self._slots.histories[slot]
            token = draw(logits[row], history, batch.masks.get(s))
            result.tokens[s] = token
            if token == BROKEN_ROW:
                self._slots.drew(slot, 0)
                return
            if history.spec.logprobs is not None:
                result.logprobs[s] = top_logprobs(logits[row], token, history.spec.logprobs)
            self._slots.drew(slot, token)

        if all(self._slots.histories[int(batch.slots[s])].quick for s in sampled):
            for row in range(len(sampled)):
                one(row)
        else:
            self._model.workers.each(len(sampled), one)

    def _score_prompts(self, batch: StepBatch, logits: F32, result: StepResult) -> None:
        """Log-probabilities of the prompt's own tokens; logits holds the asked sequences' rows in order."""
        row = 0
        for s in sorted(batch.prompt_logprobs):
            count = int(batch.query_lens[s])
            following = self._slots.next_tokens(int(batch.slots[s]), int(batch.starts[s]), count)
            result.prompt_logprobs[s] = [
                top_logprobs(logits[row + i], int(token), batch.prompt_logprobs[s])
                for i, token in enumerate(following)
            ]
            row += count


class CpuEncoder(LoadedModel):
    """A program that computes whole texts (see `rvllm.backends.base.Encoder`)."""

    def embed(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `Encoder.embed`; the batch holds whole texts."""
        return self._forward(batch).buffers["embeddings"]

    def embed_tokens(self, batch: StepBatch) -> list[F32]:
        head, rows = classifier(self._model.program), self._forward(batch).buffers[ROWS]
        if head is not None:
            rows = classify_tokens(head, rows, self._model.weights)
        return [part.copy() for part in np.split(rows, np.cumsum(batch.query_lens)[:-1])]

    def _forward(self, batch: StepBatch) -> Run:
        began = time.perf_counter()
        for cache in self._model.caches.values():  # what other texts left must not meet a weight of zero
            for array in cache:
                array[: -(-batch.num_tokens // KV_BLOCK) + len(batch.slots)] = 0
        tables = text_tables(batch.query_lens, self.limits.num_blocks)
        rows = np.arange(len(batch.slots))
        step = flat_step(batch.tokens, batch.query_lens, batch.starts, tables, rows, seconds=batch.seconds)
        run = Run(self._model, step)
        self._execute(run)
        self._steps += 1
        self._busy += time.perf_counter() - began
        return run
