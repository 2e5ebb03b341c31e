"""Builds a program op by op; architecture files in `models/archs` read like the block diagram they emit."""

from __future__ import annotations

from math import prod
from typing import TypeVar

from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, KVCache, Op, Part, Program, Rows, StateCache, Weight

AnyOp = TypeVar("AnyOp", bound=Op)
Thing = TypeVar("Thing")


class ProgramBuilder:
    """Collects buffers, weights, caches and ops, and refuses names given twice to different things."""

    def __init__(self, architecture: str, dtype: DType, vocab_size: int, max_position: int) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self.vocab_size = vocab_size
        self.max_position = max_position
        self._ops: list[Op] = []
        self._names: set[str] = set()
        self._buffers: dict[str, Buffer] = {}
        self._weights: dict[str, Weight] = {}
        self._caches: dict[str, KVCache] = {}
        self._states: dict[str, StateCache] = {}
        self._notes: list[str] = []

    def buffer(self, name: str, width: int, rows: Rows = "tokens", dtype: DType | None = None) -> Buffer:
        """An activation buffer [rows, width]; asking again for the same buffer returns it."""
        return self._once(self._buffers, name, Buffer(name, rows, width, dtype or self.dtype))

    def matrix(self, name: str, *parts: Part) -> Weight:
        """A weight matrix [N, K]: parts [n_i, K] stacked along N."""
        shapes = [p.shape[::-1] if p.layout == "transposed" else p.shape for p in parts]
        return self.weight(Weight(name, (sum(rows for rows, _ in shapes), shapes[0][1]), parts, "matrix"))

    def table(self, name: str, part: Part) -> Weight:
        """A lookup table [rows, width]."""
        return self.weight(Weight(name, part.shape, (part,), "table"))

    def vector(self, name: str, *parts: Part) -> Weight:
        """A vector of the parts, flattened and joined (norm weights, biases)."""
        return self.weight(Weight(name, (sum(prod(part.shape) for part in parts),), parts, "vector"))

    def weight(self, weight: Weight) -> Weight:
        """Registers a weight of any other shape (stacked experts)."""
        return self._once(self._weights, weight.name, weight)

    def cache(self, cache: KVCache) -> KVCache:
        """Registers a layer's KV cache."""
        return self._once(self._caches, cache.name, cache)

    def state(self, state: StateCache) -> StateCache:
        """Registers a recurrent layer's state."""
        return self._once(self._states, state.name, state)

    def emit(self, op: AnyOp) -> AnyOp:
        """Appends an op; its name must be new."""
        if op.name in self._names:
            raise ValueError(f"op {op.name!r} emitted twice")
        self._names.add(op.name)
        self._ops.append(op)
        return op

    def note(self, text: str) -> None:
        """A remark that `rvllm plan` prints under the list, once however often it is made."""
        if text not in self._notes:
            self._notes.append(text)

    def finish(self) -> Program:
        return Program(
            architecture=self.architecture,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            max_position=self.max_position,
            ops=tuple(self._ops),
            buffers=tuple(self._buffers.values()),
            weights=tuple(self._weights.values()),
            caches=tuple(self._caches.values()),
            notes=tuple(self._notes),
            states=tuple(self._states.values()),
        )

    @staticmethod
    def _once(table: dict[str, Thing], name: str, thing: Thing) -> Thing:
        known = table.setdefault(name, thing)
        if known != thing:
            raise ValueError(f"{name!r} declared twice, differently: {known} and {thing}")
        return known
