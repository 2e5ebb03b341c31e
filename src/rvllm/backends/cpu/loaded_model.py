"""A program in the memory of this machine, and its steps, whatever they are for."""

from __future__ import annotations

from typing import Self

from rvllm.backends.base import LedgerLine, Progress
from rvllm.backends.cpu.compiled.model import NativeModel, chosen, weight_lines
from rvllm.backends.cpu.memory import MemoryPlan, plan_memory
from rvllm.backends.cpu.reference.gemm import same_at_every_position
from rvllm.backends.cpu.reference.interpreter import Launch, empty_caches, empty_states, execute, resolve
from rvllm.backends.cpu.reference.run import Model, Run
from rvllm.backends.cpu.threads import Workers, available_cores, single_threaded_blas
from rvllm.config import EngineConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.telemetry.stats import StepKernel, grouped
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import by_name, in_float32


class LoadedModel:
    """A program loaded into memory as float32 (see `rvllm.backends.base.Backend`); it can run steps."""

    def __init__(self, model: Model, plan: MemoryPlan, native: NativeModel | None = None) -> None:
        self._launches: list[Launch] = resolve(model.program)
        self._model = model
        self._native = native
        self.name, self.limits, self._lines = "cpu", plan.limits, plan.lines
        rows = plan.limits.max_num_seqs + plan.limits.num_snapshots
        model.states.update(empty_states(model.program, rows))
        self._steps = 0
        self._busy = 0.0

    @classmethod
    def load(
        cls,
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        progress: Progress | None = None,
    ) -> Self:
        """Packs the checkpoint's weights (None: random ones from the engine's seed) and takes the KV cache.

        Raises MissingKernelError, CapacityError or UsageError before anything large is read.
        """
        resolve(program)
        if program.dtype is not DType.F32:
            raise UsageError(f"--dtype {program.dtype.value}: the CPU backend computes in float32")
        compiled = chosen(config.cpu_kernels, program)
        plan = plan_memory(program, config, weight_lines(program, checkpoint, config))
        single_threaded_blas()
        ropes = {rope: rope.table(plan.limits.max_model_len) for rope in program.ropes}
        workers = Workers(config.threads or available_cores())
        if compiled:
            native = NativeModel.load(program, checkpoint, config.seed, plan.limits, ropes, workers, progress)
            return cls(native.model, plan, native)
        _check_products(program)
        weights = by_name(program.weights, lambda w: in_float32(w, checkpoint, config.seed), progress)
        caches = empty_caches(program, plan.limits.num_blocks)
        return cls(Model(program, weights, caches, ropes, workers), plan)

    def ledger(self) -> list[LedgerLine]:
        return self._lines

    def _execute(self, run: Run) -> None:
        if self._native is None:
            execute(self._launches, run)
        else:
            self._native.execute(self._launches, run)

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

    def stats(self) -> dict[str, float]:
        """Steps run and the seconds they took."""
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_busy_seconds_total": self._busy,
        }

    def close(self) -> None:
        """Ends the threads and lets go of weights and cache."""
        self._model.workers.close()
        self._model.weights.clear()
        self._model.caches.clear()


def _check_products(program: Program) -> None:
    """Raises RvllmError if this machine's BLAS gives a row other bits at another place of its tile."""
    shapes = {w.shape[-2:] for w in program.weights if len(w.shape) >= 2}
    for outer, inner in sorted(shapes):
        if not same_at_every_position(inner, outer):
            raise RvllmError(
                f"this machine's BLAS sums rows of {inner} elements differently by their place in a tile, "
                "so outputs would depend on the batch; use NumPy's own build (pip install numpy)"
            )
