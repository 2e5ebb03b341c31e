"""Classification heads: a row a text, computed on the host in float32 whatever the device is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rvllm.program.ops.dense import Program, Weight
from rvllm.program.ops.encoder import Classify, classifier
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import in_float32

F32 = NDArray[np.float32]


def classify(op: Classify, pooled: F32, weights: Mapping[str, F32]) -> F32:
    """See `Classify`: [S, K] to [S, N], each row by itself, so that the others change no bit of it."""

    def of(weight: Weight | None) -> F32 | None:
        return None if weight is None else weights[weight.name]

    def row(x: F32) -> F32:
        dense, dense_bias, bias = of(op.dense), of(op.dense_bias), of(op.bias)
        if dense is not None:
            x = np.tanh(dense @ x + (0 if dense_bias is None else dense_bias))
        found = weights[op.weight.name] @ x
        if bias is not None:
            found = found + bias
        return found[1:] - found[:1] if op.contrast else found

    return np.stack([row(x) for x in pooled]).astype(np.float32)


def classify_tokens(op: Classify, rows: F32, weights: Mapping[str, F32]) -> F32:
    """The classes of single tokens from their rows: [T, K] to [T, N]."""
    return classify(replace(op, dense=None) if op.dense_pools else op, rows, weights)


@dataclass(frozen=True)
class Head:
    """A program's classification head with its weights, for backends that compute the rest elsewhere."""

    op: Classify
    weights: dict[str, F32]

    @staticmethod
    def load(program: Program, checkpoint: Checkpoint | None, seed: int) -> Head | None:
        """The head of a program; None where it has none. checkpoint None: random weights."""
        op = classifier(program)
        if op is None:
            return None
        return Head(op, {w.name: in_float32(w, checkpoint, seed) for w in op.weights})

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(weight.nbytes for weight in self.weights.values())

    def __call__(self, pooled: F32) -> F32:
        """[S, K] pooled vectors to [S, N] numbers."""
        return classify(self.op, pooled, self.weights)

    def of_tokens(self, rows: F32) -> F32:
        """[T, K] rows to [T, N] numbers."""
        return classify_tokens(self.op, rows, self.weights)


def without_head(program: Program) -> Program:
    """The program up to the vectors that its head reads."""
    op = classifier(program)
    if op is None:
        return program
    names = {w.name for w in op.weights}
    return replace(
        program,
        ops=program.ops[:-1],
        weights=tuple(w for w in program.weights if w.name not in names),
        buffers=tuple(b for b in program.buffers if b != op.out),
    )
