"""A loaded program and one pass over its ops: what every kernel of the interpreter is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.step import Step
from rvllm.backends.cpu.threads import Workers
from rvllm.program.ops.dense import Buffer, Program, Weight
from rvllm.program.rope import Rope

F32 = NDArray[np.float32]
ROWS = 16  # rows that elementwise work takes at a time


@dataclass
class Model:
    """A program with its weights, caches and rope tables in memory.

    caches: name → (keys, values), each [blocks, BLOCK, kv heads, dim]; see `interpreter.empty_caches`.
    ropes: cos and sin [max_model_len, dim / 2] by rope. states: name → [slots, elements].
    """

    program: Program
    weights: dict[str, F32]
    caches: dict[str, tuple[NDArray[Any], NDArray[Any]]]
    ropes: dict[Rope, tuple[F32, F32]]
    workers: Workers
    states: dict[str, F32] = field(default_factory=dict)


@dataclass
class Run:
    """One pass over the ops."""

    model: Model
    step: Step
    buffers: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __getitem__(self, buffer: Buffer) -> F32:
        return self.buffers[buffer.name]

    def __setitem__(self, buffer: Buffer, value: F32) -> None:
        self.buffers[buffer.name] = value

    def weight(self, weight: Weight | None) -> F32 | None:
        """A weight's array, None for an absent one."""
        return None if weight is None else self.model.weights[weight.name]

    def by_rows(self, count: int, work: Callable[[slice], None]) -> None:
        """Runs elementwise work on a few of `count` rows at a time, so that temporaries stay in cache, on all
        threads."""
        self.model.workers.each(-(-count // ROWS), lambda i: work(slice(i * ROWS, (i + 1) * ROWS)))


Kernel = Callable[[Any, Run], None]
