"""A program loaded for the compiled kernels: packed weights, caches in their layout, machine code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rvllm.backends.base import KV_BLOCK, LedgerLine, Limits, Progress
from rvllm.backends.cpu.compiled.library import Library, load, missing
from rvllm.backends.cpu.compiled.slots import LANES
from rvllm.backends.cpu.memory import ELEMENT, WEIGHTS, rows_of_a_step
from rvllm.backends.cpu.reference.interpreter import RESULTS, Launch, empty_caches
from rvllm.backends.cpu.reference.run import F32, Model, Run
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.program.ops.dense import KVCache, Program, RopeKV, Weight
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import by_name, in_float32

if TYPE_CHECKING:
    from rvllm.backends.cpu.compiled.formats import Matrix
    from rvllm.backends.cpu.compiled.lower import Kernels
    from rvllm.backends.cpu.compiled.step import NativeStep
    from rvllm.backends.cpu.threads import Workers
    from rvllm.program.rope import Rope


def chosen(setting: str, program: Program | None = None) -> bool:
    """Whether --cpu-kernels asks for compiled ones. Raises UsageError when they are asked for and absent.

    They read keys and values in float32: auto takes NumPy's for a program with caches in FP8.
    """
    absent = missing()
    if program is not None and any(cache.fp8 for cache in program.caches):
        absent = "they read keys and values in float32; use numpy, or --kv-cache-dtype auto"
    if setting == "compiled" and absent:
        raise UsageError(f"--cpu-kernels compiled: {absent}")
    return setting != "numpy" and absent is None


def weight_lines(program: Program, checkpoint: Checkpoint | None, config: EngineConfig) -> list[LedgerLine]:
    """What the weights will take, with the kernels that --cpu-kernels chooses; checkpoint None: random ones.

    Raises UsageError when compiled kernels are asked for and absent.
    """
    if not chosen(config.cpu_kernels, program):
        return [LedgerLine(WEIGHTS, sum(w.elements for w in program.weights) * ELEMENT)]
    packed, (_, plain) = packed_weights(program, checkpoint, config), _placed(program)
    return [
        LedgerLine("packed weights, compiled kernels", sum(packed.values())),
        LedgerLine(WEIGHTS, sum(ELEMENT * w.elements for w in program.weights if w.name in plain)),
    ]


def packed_weights(program: Program, checkpoint: Checkpoint | None, config: EngineConfig) -> dict[str, int]:
    """Bytes of each weight that is kept in a form of the kernels', by name; the others are float32."""
    from rvllm.backends.cpu.compiled.formats import packed_nbytes

    wanted, _ = _placed(program) if chosen(config.cpu_kernels, program) else (set(), set())
    return {w.name: packed_nbytes(w, checkpoint) for w in program.weights if w.name in wanted}


def _placed(program: Program) -> tuple[set[str], set[str]]:
    """Names of the weights that compiled ops want packed, and of those wanted as float32; some are both."""
    from rvllm.backends.cpu.compiled import lower

    names = lower.supported(program)
    packed = {op.name: lower.matrices_of(op) if op.name in names else () for op in program.ops}
    wanted = {w.name for op in program.ops for w in packed[op.name]}
    plain = {w.name for op in program.ops for w in op.weights if w not in packed[op.name]}
    return wanted, plain


def caches_for(program: Program, supported: Iterable[str], blocks: int) -> dict[str, tuple[F32, F32]]:
    """Caches in the compiled kernels' layout where these use them, else in the interpreter's."""
    names = set(supported)
    own = {op.cache.name for op in program.ops if isinstance(op, RopeKV) and op.name in names}
    caches = empty_caches(program, blocks)  # takes no memory before it is written
    return caches | {c.name: _cache(c, blocks) for c in program.caches if c.name in own}


def _cache(cache: KVCache, blocks: int) -> tuple[F32, F32]:
    padded = -(-cache.value_dim // LANES) * LANES
    keys = np.zeros((blocks + 1, cache.heads, cache.key_dim, KV_BLOCK), dtype=np.float32)
    return keys, np.zeros((blocks + 1, cache.heads, KV_BLOCK, padded), dtype=np.float32)


class NativeModel:
    """Runs a loaded program's steps on compiled kernels."""

    def __init__(self, model: Model, step: NativeStep, kernels: Kernels) -> None:
        """stored: bytes of each packed weight. compiled: ops that have kernels; the others run in NumPy."""
        self.model = model
        self.stored = {name: matrix.nbytes for name, matrix in kernels.matrices.items()}
        self.compiled = kernels.supported
        self._step = step

    @staticmethod
    def load(
        program: Program,
        checkpoint: Checkpoint | None,
        seed: int,
        limits: Limits,
        ropes: dict[Rope, tuple[F32, F32]],
        workers: Workers,
        progress: Progress | None = None,
    ) -> NativeModel:
        """Packs the weights for the kernels that come with the package.

        Raises UsageError when their library cannot be loaded.
        """
        from rvllm.backends.cpu.compiled import lower
        from rvllm.backends.cpu.compiled.step import NativeStep

        wanted, plain = _placed(program)
        weights = {w.name: in_float32(w, checkpoint, seed) for w in program.weights if w.name in plain}
        matrices = _packed([w for w in program.weights if w.name in wanted], checkpoint, seed, progress)
        names = lower.supported(program)
        caches = caches_for(program, names, limits.num_blocks)
        kernels = lower.Kernels(names, matrices, weights, caches, ropes)
        rows = rows_of_a_step(limits.max_num_batched_tokens, limits.max_num_seqs)
        step = NativeStep(program, kernels, _library(), workers, limits.max_model_len, *rows)
        return NativeModel(Model(program, weights, caches, ropes, workers), step, kernels)

    def execute(self, launches: list[Launch], run: Run) -> None:
        """Runs all ops; the results are the run's own arrays."""
        from rvllm.backends.cpu.compiled.step import Compiled

        kernels = {launch.op.name: launch.kernel for launch in launches}
        native = self._step
        native.begin(run.step)
        views = native.views(run.step)
        run.buffers.update(views)
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            for stage in native.stages:
                if isinstance(stage, Compiled):
                    native.run(stage)
                    continue
                kernels[stage.name](stage, run)
                for buffer in stage.writes:
                    view, made = views.get(buffer.name), run.buffers[buffer.name]
                    if view is None:
                        if np.may_share_memory(made, native.memory):  # its place there will be another's
                            run.buffers[buffer.name] = made.copy()
                    elif made is not view:
                        view[...] = made.reshape(view.shape)
                        run.buffers[buffer.name] = view
        for name in RESULTS:
            if name in run.buffers:
                run.buffers[name] = run.buffers[name].copy()


def _packed(
    weights: Sequence[Weight], checkpoint: Checkpoint | None, seed: int, progress: Progress | None
) -> dict[str, Matrix]:
    """The weights packed: as an earlier start kept them, else now, and then kept for the next."""
    from rvllm.backends.cpu.compiled import packed_cache
    from rvllm.backends.cpu.compiled.formats import pack_matrix, packed_nbytes

    folder, most = packed_cache.settings()
    nbytes = sum(packed_nbytes(weight, checkpoint) for weight in weights)
    worth = checkpoint is not None and packed_cache.MIN_BYTES <= nbytes <= most
    key = packed_cache.key_of(weights, checkpoint) if checkpoint is not None and worth else None
    if key is not None and (kept := packed_cache.load(key, [w.name for w in weights], folder)) is not None:
        return kept
    matrices = by_name(weights, lambda w: pack_matrix(w, checkpoint, seed), progress)
    if key is not None:
        packed_cache.store(key, matrices, folder, most)
    return matrices


def _library() -> Library:
    try:
        return load()
    except OSError as error:
        hint = "use --cpu-kernels numpy"
        raise UsageError(f"the compiled CPU kernels cannot be loaded: {error}; {hint}") from None
