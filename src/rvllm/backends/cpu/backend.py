"""The CPU backend: NumPy runs the program, one step at a time."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import (
    BROKEN_ROW,
    LedgerLine,
    Limits,
    Progress,
    StepBatch,
    StepKernel,
    StepResult,
    grouped,
)
from rvllm.backends.cpu.compiled.model import NativeModel, chosen
from rvllm.backends.cpu.measure import Rates, measure
from rvllm.backends.cpu.memory import MemoryPlan, plan_memory, weight_bytes
from rvllm.backends.cpu.pools import Pools
from rvllm.backends.cpu.reference.gemm import same_at_every_position
from rvllm.backends.cpu.reference.interpreter import (
    F32,
    Launch,
    Model,
    Run,
    empty_caches,
    empty_states,
    execute,
    resolve,
)
from rvllm.backends.cpu.reference.sampler import draw
from rvllm.backends.cpu.slots import Slots, text_tables
from rvllm.backends.cpu.step import BLOCK, flat_step
from rvllm.backends.cpu.threads import Workers, available_cores, single_threaded_blas
from rvllm.backends.logprobs import top_logprobs
from rvllm.config import EngineConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import LatentRopeKV, Program, RopeKV
from rvllm.program.ops.encoder import embedding_size
from rvllm.program.rope import Rope
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import dummy, pack


class CpuBackend:
    """A program loaded into memory as float32 (see `rvllm.backends.base.Backend`)."""

    def __init__(self, model: Model, plan: MemoryPlan, native: NativeModel | None = None) -> None:
        self._launches: list[Launch] = resolve(model.program)
        self._model = model
        self._native = native
        self._plan = plan
        self._slots = Slots(plan.limits, model.program.vocab_size)
        self._pools = Pools(model.caches, plan.limits.num_cpu_blocks)
        model.states.update(empty_states(model.program, plan.limits.max_num_seqs))
        self._steps = 0
        self._rates: Rates | None = None
        self._busy = 0.0

    @staticmethod
    def load(
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        progress: Progress | None = None,
    ) -> CpuBackend:
        """Packs the checkpoint's weights (None: random ones from the engine's seed) and takes the KV cache.

        Raises MissingKernelError, CapacityError or UsageError before anything large is read.
        """
        resolve(program)
        if program.dtype is not DType.F32:
            raise UsageError(f"--dtype {program.dtype.value}: the CPU backend computes in float32")
        compiled = chosen(config.cpu_kernels)
        plan = plan_memory(program, config, weight_form=weight_bytes(program, checkpoint, config))
        single_threaded_blas()
        ropes = rope_tables(program, plan.limits.max_model_len)
        workers = Workers(config.threads or available_cores())
        if compiled:
            native = NativeModel.load(program, checkpoint, config.seed, plan.limits, ropes, workers, progress)
            return CpuBackend(native.model, plan, native)
        _check_products(program)
        weights: dict[str, F32] = {}
        done, total = 0, sum(w.elements for w in program.weights) or 1
        for weight in program.weights:
            weights[weight.name] = (
                dummy(weight, config.seed) if checkpoint is None else pack(weight, checkpoint, DType.F32)
            )
            done += weight.elements
            if progress is not None:
                progress(done / total, "loading weights")
        model = Model(
            program=program,
            weights=weights,
            caches=empty_caches(program, plan.limits.num_blocks),
            ropes=ropes,
            workers=workers,
        )
        return CpuBackend(model, plan)

    @property
    def name(self) -> str:
        """`cpu`."""
        return "cpu"

    @property
    def limits(self) -> Limits:
        """Capacities, fixed for the backend's life."""
        return self._plan.limits

    def ledger(self) -> list[LedgerLine]:
        """Weights, KV blocks, rope tables, recurrent states, and the workspace of compiled kernels."""
        ropes = sum(cos.nbytes + sin.nbytes for cos, sin in self._model.ropes.values())
        native = self._native
        compiled = [] if native is None else native.ledger()
        return [
            *compiled,
            LedgerLine("weights", sum(w.nbytes for w in self._model.weights.values())),
            LedgerLine("kv cache", self._plan.kv_bytes),
            LedgerLine("rope tables", ropes),
            *self._plan.state_lines,
            *self._plan.host_lines,
        ]

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

    def _execute(self, run: Run) -> None:
        if self._native is None:
            execute(self._launches, run)
        else:
            self._native.execute(self._launches, run)

    def collect(self, handle: StepResult) -> StepResult:
        """The result of a launched step."""
        return handle

    def embed(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `Backend.embed`; the batch holds whole texts. Raises UsageError for models that generate."""
        program = self._model.program
        if embedding_size(program) is None:
            raise UsageError(f"{program.architecture} generates text; it gives no embeddings")
        began = time.perf_counter()
        for cache in self._model.caches.values():  # what other texts left must not meet a weight of zero
            for array in cache:
                array[: -(-batch.num_tokens // BLOCK) + len(batch.slots)] = 0
        tables = text_tables(batch.query_lens, self.limits.num_blocks)
        rows = np.arange(len(batch.slots))
        step = flat_step(batch.tokens, batch.query_lens, batch.starts, tables, rows, seconds=batch.seconds)
        run = Run(self._model, step)
        self._execute(run)
        self._steps += 1
        self._busy += time.perf_counter() - began
        return run.buffers["embeddings"]

    def last_kernels(self) -> list[StepKernel]:
        """The functions that computed the last step; see `Backend.last_kernels`."""
        if not self._steps:
            return []
        compiled = frozenset[str]() if self._native is None else self._native.compiled
        return grouped(
            (op.name, f"{'compiled' if op.name in compiled else 'numpy'} {launch.kernel.__name__}", "")
            for launch in self._launches
            for op in (launch.op,)
        )

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
        """Steps run and the seconds they took."""
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_busy_seconds_total": self._busy,
            "rvllm:kv_block_move_seconds_total": self._pools.seconds,
        }

    def close(self) -> None:
        """Ends the threads and lets go of weights and cache."""
        self._model.workers.close()
        self._model.weights.clear()
        self._model.caches.clear()
        self._pools.clear()

    def _draw(self, batch: StepBatch, sampled: NDArray[np.int64], logits: F32, result: StepResult) -> None:
        def one(row: int) -> None:
            s = int(sampled[row])
            slot = int(batch.slots[s])
            history = self._slots.history(slot)
            token = draw(logits[row], history, batch.masks.get(s))
            result.tokens[s] = token
            if token == BROKEN_ROW:
                self._slots.drew(slot, 0)
                return
            if history.spec.logprobs is not None:
                result.logprobs[s] = top_logprobs(logits[row], token, history.spec.logprobs)
            self._slots.drew(slot, token)

        quick = all(self._slots.history(int(batch.slots[s])).quick for s in sampled)
        if quick:
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


def rope_tables(program: Program, length: int) -> dict[Rope, tuple[F32, F32]]:
    """cos and sin for every rope of the program, [length, dim / 2] each."""
    ropes = {op.rope for op in program.ops if isinstance(op, RopeKV | LatentRopeKV) and op.rope is not None}
    return {rope: rope.table(length) for rope in ropes}


def _check_products(program: Program) -> None:
    """Raises RvllmError if this machine's BLAS gives a row other bits at another place of its tile."""
    shapes = {w.shape[-2:] for w in program.weights if len(w.shape) >= 2}
    for outer, inner in sorted(shapes):
        if not same_at_every_position(inner, outer):
            raise RvllmError(
                f"this machine's BLAS sums rows of {inner} elements differently by their place in a tile, "
                "so outputs would depend on the batch; use NumPy's own build (pip install numpy)"
            )
