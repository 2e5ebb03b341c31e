"""Which kernels an op becomes, and with what arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.compiled.formats import Format, Matrix, aligned
from rvllm.backends.cpu.compiled.slots import (
    BLOCK_ROWS,
    CHUNK,
    CHUNK_FIRST,
    CHUNK_ROWS,
    HEADS_ACROSS,
    LANES,
    PIECE,
    SAMPLES,
    SUM_GROUP,
    TOKENS,
)
from rvllm.backends.cpu.memory import expert_rows
from rvllm.program.ops import dense as ops
from rvllm.program.ops.dense import Buffer, Op, Program, Weight
from rvllm.program.rope import Rope

F32 = NDArray[np.float32]
SUPPORTED = (
    ops.Embed, ops.Norm, ops.Linear, ops.RopeKV, ops.Attention, ops.GatedActivation, ops.Activate, ops.Add,
    ops.GatherRows, ops.Logits, ops.Route, ops.Experts, ops.LatentRopeKV, ops.LatentAttention, ops.HeadLinear,
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
    """Where a step's data lies. rows: the most of any buffer. chunks: by a kind of rows (see `slots`)."""

    buffers: dict[str, NDArray[Any]]
    step: NDArray[np.int64]
    chunks: dict[str, NDArray[np.int64]]
    threads: int
    rows: int
    max_len: int
    kept: list[NDArray[Any]] = field(default_factory=list)
    _shared: dict[str, NDArray[Any]] = field(default_factory=dict)

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

    def shared(self, name: str, nbytes: int) -> int:
        """The address of memory that calls share, at least `nbytes`; none is taken before it is written."""
        found = self._shared.get(name)
        if found is None or found.nbytes < nbytes:
            found = self._shared[name] = aligned(nbytes)
            self.kept.append(found)
        return found.ctypes.data

    def scratch(self, name: str, nbytes: int) -> tuple[int, int]:
        """Address and size a thread of memory that calls share, at least `nbytes` a thread."""
        size = -(-nbytes // 64) * 64
        return self.shared(name, size * self.threads), size

    def in_order(self, count: int) -> int:
        """The address of 0, 1, ... count - 1."""
        found = self._shared.get("in order")
        if found is None or len(found) < count:
            found = self._shared["in order"] = np.arange(count, dtype=np.int64)
            self.kept.append(found)
        return found.ctypes.data


def supported(program: Program) -> frozenset[str]:
    """The names of the ops that are compiled: all of a kind there is a kernel for.

    A cache that another op reads or writes too keeps the interpreter's form, and its ops stay there. Experts
    and heads whose rows are no whole tiles stay there too.
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
        and not (isinstance(op, ops.Experts) and (op.down.shape[2] % LANES or op.down.shape[1] % LANES))
        and not (isinstance(op, ops.HeadLinear) and op.weight.shape[1] % LANES)
    )


def matrices_of(op: Op) -> tuple[Weight, ...]:
    """The weights that a compiled op wants packed."""
    if isinstance(op, ops.Linear | ops.Logits | ops.Route | ops.HeadLinear):
        return (op.weight,)
    if isinstance(op, ops.Experts):
        return op.up, op.down
    return (op.table,) if isinstance(op, ops.Embed) else ()


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
    weight: Weight,
    x: Buffer,
    out: tuple[int, int],
    kernels: Kernels,
    places: Places,
    bias: Weight | None = None,
) -> list[Call]:
    """x @ weight.T; out: address and width of the result. bias: what is added to the product at once."""
    calls = []
    chunks, rows = places.chunks[x.rows].ctypes.data, places.in_order(places.rows)
    for segment in kernels.matrices[weight.name].segments:
        added = np.zeros(segment.tiles * LANES, dtype=np.float32)
        if bias is not None:
            added[: segment.rows] = kernels.vectors[bias.name][segment.first : segment.first + segment.rows]
        piece = np.array([segment.data.ctypes.data, segment.rows, segment.first])
        arguments = (
            chunks, places.of(x), x.width, *out, places.keep(piece), segment.tiles, segment.inner,
            places.keep(added), rows, rows, *_panel(segment.inner, places),
        )  # fmt: skip
        calls.append(Call(f"product_{segment.format.name}", arguments))
    return calls


def _panel(inner: int, places: Places) -> tuple[int, int]:
    """Each thread's room for a tile of levels as floats and for sums of a chunk's groups."""
    return places.scratch("panel", inner * LANES * 4 + BLOCK_ROWS * (inner // SUM_GROUP) * 4)


def _linear(op: ops.Linear, kernels: Kernels, places: Places) -> list[Call]:
    return _product(op.weight, op.x, (places.of(op.out), op.out.width), kernels, places, op.bias)


def _logits(op: ops.Logits, kernels: Kernels, places: Places) -> list[Call]:
    width = op.out.width
    plain = op.scale == 1.0 and op.soft_cap is None
    product = _product(
        op.weight, op.x, (places.of(op.out), width), kernels, places, op.bias if plain else None
    )
    if plain:
        return product
    bias = np.zeros(width, np.float32) if op.bias is None else kernels.vectors[op.bias.name]
    arguments = (places.count(op.out), places.of(op.out), width, places.keep(bias), float(op.scale))
    finish = Call(f"finish{_capped(op)}", (*arguments, float(op.soft_cap or 0.0)))
    return [*product, finish]


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
    source = (places.of(op.qkv), op.qkv.width, op.heads, op.kv_heads, op.head_dim, values.shape[3])
    target = (keys.ctypes.data, values.ctypes.data, places.of(op.out), op.out.width)
    scoring = (float(op.scale), op.window or 0, float(op.soft_cap or 0.0))
    arguments = (places.step.ctypes.data, *source, *target, *scoring, *_scores(places))
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


def _route(op: ops.Route, kernels: Kernels, places: Places) -> list[Call]:
    experts = op.weight.shape[0]
    logits = places.shared("router", places.rows * experts * 4)
    product = _product(op.weight, op.x, (logits, experts), kernels, places)
    bias = np.zeros(experts, np.float32) if op.bias is None else kernels.vectors[op.bias.name].reshape(-1)
    choosing = (op.top_k, op.groups, op.kept_groups, op.group_score == "top2")
    sharing = (op.renormalise, float(op.scale), op.always, places.of(op.ids), places.of(op.shares))
    scratch = places.scratch("choice", (2 * experts + op.groups) * 4)
    arguments = (places.count(op.x), logits, experts, places.keep(bias), *choosing, *sharing, *scratch)
    return [*product, Call(f"route_{op.scores}", arguments)]


def _experts(op: ops.Experts, kernels: Kernels, places: Places) -> list[Call]:
    """Rows of one expert side by side through both products, then back in the order of tokens."""
    experts, chosen = op.up.shape[0], op.ids.width
    rows = places.rows * chosen
    sources, targets = (places.shared(name, rows * 8) for name in ("sources", "targets"))
    in_order = places.in_order(rows)
    chunks = places.shared("chunks", (CHUNK_FIRST + rows * CHUNK) * 8)
    wide, narrow = expert_rows(op)
    first, inner = places.shared("experts", rows * wide * 4), places.shared("activated", rows * narrow * 4)
    up = (chunks, places.of(op.x), op.x.width, first, op.up.shape[1])
    down = (chunks, inner, narrow, first, op.out.width)
    activation = f"gated_{op.activation}" if op.gated else op.activation
    count = places.count(op.x)
    counting = (places.of(op.ids), chosen, experts, places.shared("places", experts * 8))
    return [
        Call("assign", (count, *counting, sources, targets, chunks)),
        *_stacked_products(op.up, up, (sources, in_order), kernels, places),
        Call(activation, (chunks + CHUNK_ROWS * 8, first, op.up.shape[1], inner, narrow)),
        *_stacked_products(op.down, down, (in_order, targets), kernels, places),
        Call("combine", (count, first, places.of(op.shares), chosen, places.of(op.out), op.out.width)),
    ]


def _stacked_products(
    weight: Weight, data: tuple[int, ...], rows: tuple[int, int], kernels: Kernels, places: Places
) -> list[Call]:
    """A product for every format of a stack. data: the kernel's first arguments; rows: its two maps."""
    outer, inner = weight.shape[1:]
    bias = places.keep(np.zeros(outer, dtype=np.float32))
    return [
        Call(
            f"product_{form.name}",
            (*data, places.keep(pieces), int(pieces[:, 1].max()) // LANES, inner, bias, *rows,
             *_panel(inner, places)),
        )
        for form, pieces in expert_pieces(kernels.matrices[weight.name], weight)
    ]  # fmt: skip


def expert_pieces(matrix: Matrix, weight: Weight) -> list[tuple[Format, NDArray[np.int64]]]:
    """A stack's rows by format: int64 [experts, PIECE], and more tables where an expert has several runs."""
    experts, outer = weight.shape[:2]
    tables: dict[tuple[str, int], tuple[Format, NDArray[np.int64]]] = {}
    runs: dict[tuple[str, int], int] = {}
    for segment in matrix.segments:
        end = segment.first + segment.rows
        for expert in range(segment.first // outer, -(-end // outer)):
            begin, stop = max(segment.first, expert * outer), min(end, (expert + 1) * outer)
            name = segment.format.name
            run = runs[name, expert] = runs.get((name, expert), -1) + 1
            tile = (begin - segment.first) // LANES
            address = segment.data.ctypes.data + tile * segment.format.tile_bytes(segment.inner)
            empty = (segment.format, np.zeros((experts, PIECE), dtype=np.int64))
            tables.setdefault((name, run), empty)[1][expert] = address, stop - begin, begin - expert * outer
    return list(tables.values())


def _head_linear(op: ops.HeadLinear, kernels: Kernels, places: Places) -> list[Call]:
    """A product over chunks of one head each; the rest of a head's row is copied."""
    heads, outer, inner = op.weight.shape
    rows = places.rows * heads
    order = places.shared("heads in order", rows * 8)
    chunks = places.shared("chunks of heads", (CHUNK_FIRST + rows * CHUNK) * 8)
    x, out = (places.of(op.x), inner + op.tail), (places.of(op.out), outer + op.tail)
    calls = [
        Call("by_head", (places.count(op.x), heads, order, chunks)),
        *_stacked_products(op.weight, (chunks, *x, *out), (order, order), kernels, places),
    ]
    if op.tail:
        calls.append(Call("tails", (chunks + CHUNK_ROWS * 8, *x, *out, op.tail)))
    return calls


def _latent_rope(op: ops.LatentRopeKV, kernels: Kernels, places: Places) -> list[Call]:
    cosines, sines = kernels.ropes[op.rope]
    latents, _ = kernels.caches[op.cache.name]
    arguments = (
        places.step.ctypes.data, places.of(op.q), op.heads, op.head_dim, places.of(op.kv), op.kv.width,
        cosines.shape[1], places.keep(cosines), places.keep(sines), latents.ctypes.data,
    )  # fmt: skip
    return [Call("latent_rope_interleaved" if op.rope.interleaved else "latent_rope", arguments)]


def _latent_attention(op: ops.LatentAttention, kernels: Kernels, places: Places) -> list[Call]:
    latents, key_dim = kernels.caches[op.cache.name][0].ctypes.data, op.cache.key_dim
    source = (places.step.ctypes.data, places.of(op.q), op.q.width, op.heads, 1, key_dim, key_dim)
    target = (latents, latents, places.of(op.out), op.out.width)
    arguments = (*source, *target, float(op.scale), 0, 0.0, *_scores(places), op.rank)
    return [Call("latent_attention", arguments)]


def _scores(places: Places) -> tuple[int, int]:
    """Each thread's room for the scores of the heads that it computes side by side."""
    return places.scratch("scores", HEADS_ACROSS * (places.max_len + 3 * LANES) * 4)


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
    ops.Route: _route,
    ops.Experts: _experts,
    ops.HeadLinear: _head_linear,
    ops.LatentRopeKV: _latent_rope,
    ops.LatentAttention: _latent_attention,
}
