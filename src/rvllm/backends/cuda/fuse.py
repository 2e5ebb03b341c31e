"""Fixed patterns of neighbouring ops that one kernel computes, bit for bit as the separate ops would."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rvllm.program.ops import Add, Buffer, GatedActivation, Linear, Norm, Op, Program

GATED = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Stage:
    """One op, or several that run as one kernel; `inner` buffers never exist in memory."""

    ops: tuple[Op, ...]
    inner: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The names of its ops, joined."""
        return " + ".join(op.name for op in self.ops)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers read from memory."""
        return tuple(b for op in self.ops for b in op.reads if b.name not in self.inner)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers written to memory."""
        return tuple(b for op in self.ops for b in op.writes if b.name not in self.inner)


def fuse(program: Program, gated_epilogue: bool = True) -> list[Stage]:
    """The program's ops in order, with these patterns merged:

    Linear, GatedActivation of its result: the activation is the product's epilogue (`gated_epilogue`).
    Linear, Add of its result: the residual add is the product's epilogue.
    Add, Norm of its result: one pass over the row.

    A product's result is merged away only where nothing else reads it.
    """
    readers = Counter(b.name for op in program.ops for b in op.reads)
    stages: list[Stage] = []
    position = 0
    ops = program.ops
    while position < len(ops):
        op, after = ops[position], ops[position + 1] if position + 1 < len(ops) else None
        stage = Stage((op,))
        if isinstance(op, Linear) and after is not None and readers[op.out.name] == _reads(after, op.out):
            gated = isinstance(after, GatedActivation) and after.activation in GATED and after.x == op.out
            gated = gated and gated_epilogue
            added = isinstance(after, Add) and after.y == op.out and after.x != op.out
            if gated or added:
                stage = Stage((op, after), (op.out.name,))
        elif isinstance(op, Add) and isinstance(after, Norm) and _norms_rows(after) and after.x == op.x:
            stage = Stage((op, after))
        stages.append(stage)
        position += len(stage.ops)
    return stages


def _reads(op: Op, buffer: Buffer) -> int:
    return sum(b == buffer for b in op.reads)


def _norms_rows(op: Norm) -> bool:
    return op.group is None and op.width is None and op.out != op.x
