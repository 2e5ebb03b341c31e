"""Which kernels an op becomes, and with what arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.compiled.formats import Matrix, aligned
from rvllm.backends.cpu.compiled.slots import BLOCK_ROWS, HEADS_ACROSS, LANES, SAMPLES, SUM_GROUP, TOKENS
from rvllm.program.ops import dense as ops
from rvllm.program.ops.dense import Buffer, Op, Program, Weight
from rvllm.program.rope import Rope

F32 = NDArray[np.float32]
SUPPORTED = (
    ops.Embed, ops.Norm, ops.Linear, ops.RopeKV, ops.Attention, ops.GatedActivation, ops.Activate, ops.Add,
    ops.GatherRows, ops.Logits,
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A kernel and its arguments but the last, the counter by which threads share its work."""

    kernel: str
    arguments: tuple[Any, ...]


@dataclass
class Kernels:
    """What compiled ops work on, by name.

    caches: keys [blocks, heads, dim, 16] and values [blocks, heads, 16, padded dim].
    """

    supported: frozenset[str]  # names of the ops that are compiled
    matrices: dict[str, Matrix]
    vectors: dict[str, F32]
    caches: dict[str, tuple[F32, F32]]
    ropes: dict[Rope, tuple[F32, F32]]


@dataclass
class Places:
    """Where a step's data lies. scratch: per thread, for a panel of floats or a query's scores."""

    buffers: dict[str, F32]
    step: NDArray[np.int64]
    threads: int
    rows: int
    max_len: int
    kept: list[NDArray[Any]] = field(default_factory=list)
    _scratch: dict[str, NDArray[Any]] = field(default_factory=dict)

    def of(self, buffer: Buffer) -> int:
        """A buffer's address."""
        return self.buffers[buffer.name].ctypes.data

    def count(self, buffer: Buffer) -> int:
        """The address of the number of rows of a buffer."""
        return self.step[TOKENS if buffer.rows == "tokens" else SAMPLES :].ctypes.data

    def keep(self, array: NDArray[Any]) -> int:
        """The address of an array that must live as long as the calls."""
        self.kept.append(array)
        return array.ctypes.data

    def scratch(self, name: str, nbytes: int) -> tuple[int, int]:
        """Address and size a thread of memory that calls share, at least `nbytes` a thread."""
        size = -(-nbytes // 64) * 64
        found = self._scratch.get(name)
        if found is None or found.nbytes < size * self.threads:
            found = self._scratch[name] = aligned(size * self.threads)
            self.kept.append(found)
        return found.ctypes.data, size


def supported(program: Program) -> frozenset[str]:
    """The names of the ops that are compiled: all of a kind there is a kernel for.

    A cache that another op reads or writes too keeps the interpreter's form, and its ops stay there.
    """
    foreign = {
        value.name
        for op in program.ops
        if not isinstance(op, SUPPORTED)
        for value in vars(op).values()
        if isinstance(value, ops.KVCache)
    }
    return frozenset(
        op.name
        for op in program.ops
        if isinstance(op, SUPPORTED)
        and not (isinstance(op, ops.RopeKV | ops.Attention) and op.cache.name in foreign)
        and not (isinstance(op, ops.Embed) and len(op.table.parts) > 1)
    )


def matrix_of(op: Op) -> Weight | None:
    """The weight that a compiled op wants packed."""
    if isinstance(op, ops.Linear | ops.Logits):
        return op.weight
    return op.table if isinstance(op, ops.Embed) else None


def lower(op: Op, kernels: Kernels, places: Places) -> list[Call] | None:
    """The op's calls, None where the interpreter runs it."""
    if op.name not in kernels.supported:
        return None
    return _LOWER[type(op)](op, kernels, places)


def _embed(op: ops.Embed, kernels: Kernels, places: Places) -> list[Call]:
    (segment,) = kernels.matrices[op.table.name].segments
    step, data = places.step.ctypes.data, segment.data.ctypes.data
    arguments = (step, data, segment.data.shape[1], segment.inner, places.of(op.out), float(op.scale))
    return [Call(f"embed_{segment.format.name}", arguments)]


def _norm(op: ops.Norm, kernels: Kernels, places: Places) -> list[Call]:
    width = op.x.width - op.start if op.width is None else op.width
    length = op.group or width
    in_place = op.out.name == op.x.name

    def vector(weight: Weight | None, absent: float) -> int:
        if weight is None:
            return places.keep(np.full(width, absent, dtype=np.float32))
        return places.keep(np.resize(kernels.vectors[weight.name].reshape(-1), width))

    target = (places.of(op.out), op.out.width, op.start if in_place else 0)
    source = (places.count(op.x), places.of(op.x), op.x.width, op.start, width // length, length)
    affine = (vector(op.weight, 1.0), vector(op.bias, 0.0), float(op.eps))
    return [Call(f"norm_{op.kind_}", (*source, *affine, *target))]


def _product(
    op: ops.Linear | ops.Logits, kernels: Kernels, places: Places, bias: Weight | None = None
) -> list[Call]:
    """bias: what is added to the product at once."""
    inner = op.x.width
    calls = []
    room = inner * LANES * 4 + BLOCK_ROWS * (inner // SUM_GROUP) * 4
    for segment in kernels.matrices[op.weight.name].segments:
        added = np.zeros(segment.tiles * LANES, dtype=np.float32)
        if bias is not None:
            added[: segment.rows] = kernels.vectors[bias.name][segment.first : segment.first + segment.rows]
        arguments = (
            places.count(op.x), places.of(op.x), inner, places.of(op.out) + 4 * segment.first, op.out.width,
            segment.data.ctypes.data, segment.tiles, inner, segment.rows, places.keep(added),
            *places.scratch("panel", room),
        )  # fmt: skip
        calls.append(Call(f"product_{segment.format.name}", arguments))
    return calls


def _linear(op: ops.Linear, kernels: Kernels, places: Places) -> list[Call]:
    return _product(op, kernels, places, op.bias)


def _logits(op: ops.Logits, kernels: Kernels, places: Places) -> list[Call]:
    if op.scale == 1.0 and op.soft_cap is None:
        return _product(op, kernels, places, op.bias)
    width = op.out.width
    bias = np.zeros(width, np.float32) if op.bias is None else kernels.vectors[op.bias.name]
    arguments = (places.count(op.out), places.of(op.out), width, places.keep(bias), float(op.scale))
    finish = Call(f"finish{_capped(op)}", (*arguments, float(op.soft_cap or 0.0)))
    return [*_product(op, kernels, places), finish]


def _capped(op: ops.Logits | ops.Attention) -> str:
    return "" if op.soft_cap is None else "_capped"


def _rope_kv(op: ops.RopeKV, kernels: Kernels, places: Places) -> list[Call]:
    keys, values = kernels.caches[op.cache.name]
    half, cos, sin = 0, 0, 0
    if op.rope is not None:
        cosines, sines = kernels.ropes[op.rope]
        half, cos, sin = cosines.shape[1], places.keep(cosines), places.keep(sines)
    shape = (places.of(op.qkv), op.qkv.width, op.heads, op.kv_heads, op.head_dim, half)
    cache = (keys.ctypes.data, values.ctypes.data, values.shape[3])
    name = "rope_interleaved" if op.rope is not None and op.rope.interleaved else "rope"
    return [Call(name, (places.step.ctypes.data, *shape, cos, sin, *cache))]


def _attend(op: ops.Attention, kernels: Kernels, places: Places) -> list[Call]:
    keys, values = kernels.caches[op.cache.name]
    scores = places.scratch("scores", HEADS_ACROSS * (places.max_len + 3 * LANES) * 4)
    source = (places.of(op.qkv), op.qkv.width, op.heads, op.kv_heads, op.head_dim, values.shape[3])
    target = (keys.ctypes.data, values.ctypes.data, places.of(op.out), op.out.width)
    scoring = (float(op.scale), op.window or 0, float(op.soft_cap or 0.0))
    arguments = (places.step.ctypes.data, *source, *target, *scoring, *scores)
    return [Call(f"attention{_capped(op)}", arguments)]


def _act(op: ops.GatedActivation | ops.Activate, kernels: Kernels, places: Places) -> list[Call]:
    arguments = (places.count(op.x), places.of(op.x), op.x.width, places.of(op.out), op.out.width)
    gated = "gated_" if isinstance(op, ops.GatedActivation) else ""
    return [Call(f"{gated}{op.activation}", arguments)]


def _add(op: ops.Add, kernels: Kernels, places: Places) -> list[Call]:
    arguments = (places.count(op.x), places.of(op.x), places.of(op.y), op.x.width, float(op.scale))
    return [Call("add", arguments)]


def _gather(op: ops.GatherRows, kernels: Kernels, places: Places) -> list[Call]:
    return [Call("gather", (places.step.ctypes.data, places.of(op.x), places.of(op.out), op.x.width))]


_LOWER: dict[type[Op], Callable[[Any, Kernels, Places], list[Call]]] = {
    ops.Embed: _embed,
    ops.Norm: _norm,
    ops.Linear: _linear,
    ops.RopeKV: _rope_kv,
    ops.Attention: _attend,
    ops.GatedActivation: _act,
    ops.Activate: _act,
    ops.Add: _add,
    ops.GatherRows: _gather,
    ops.Logits: _logits,
}
