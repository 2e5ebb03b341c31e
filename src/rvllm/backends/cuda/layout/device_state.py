"""The arena carved up: where weights, buffers, caches and the slots' state lie on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rvllm.backends.cuda.device.arena import Arena, Range
from rvllm.backends.cuda.device.driver import Pinned, Stream
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.memory import BLOCK, MemoryPlan, ropes_of, state_line
from rvllm.backends.cuda.layout.weights import ELEMENT, PackedWeight, WeightLayout
from rvllm.backends.cuda.ops.sampling.slots import MAX_TOP, StateSizes
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import Program
from rvllm.program.rope import Rope


@dataclass(frozen=True)
class LogprobArrays:
    """Device arrays of the logprobs kernel for up to `rows` entries.

    entries int32 [4, rows]: row, target, wanted, and the count in the last line's first word. The others:
    token float32 [rows], ranks int32 [rows], top_ids int32 and top float32 [rows, MAX_TOP], one behind the
    other so that one copy fetches them.
    """

    rows: int
    entries: int
    token: int

    @property
    def ranks(self) -> int:
        """Address of ranks."""
        return self.token + 4 * self.rows

    @property
    def top_ids(self) -> int:
        """Address of top_ids."""
        return self.ranks + 4 * self.rows

    @property
    def top(self) -> int:
        """Address of top."""
        return self.top_ids + 4 * MAX_TOP * self.rows

    @property
    def result_bytes(self) -> int:
        """Bytes from `token` to the end of `top`."""
        return self.rows * (8 + 8 * MAX_TOP)


@dataclass(frozen=True)
class DeviceState:
    """All addresses a step needs, and the places of the weights."""

    addresses: Addresses
    shape: Shape
    places: list[tuple[PackedWeight, int]]
    start_entries: int  # slot starts are sent here: entries, then the words they point into
    logprobs: LogprobArrays
    kv: Range


def carve(
    arena: Arena, program: Program, stages: Sequence[Stage], plan: MemoryPlan, wanted: Sequence[PackedWeight]
) -> DeviceState:
    """Takes everything the plan lists from the arena, line by line."""
    places = [(w, arena.take("weights", w.nbytes, w.weight.name).address) for w in wanted]
    weights: dict[tuple[str, WeightLayout], int] = {(w.weight.name, w.form): a for w, a in places}
    workspace = plan_workspace(list(stages), plan.tokens, plan.samples)
    base = arena.take("workspace", workspace.nbytes).address
    vocab = -(-program.vocab_size // 4) * 4
    logits = arena.take("logits", 4 * plan.samples * vocab).address
    scaled = arena.take("logits", 4 * plan.samples * vocab).address
    buffers = {name: base + place.offset for name, place in workspace.placements.items()}
    ropes = _rope_ranges(arena, program, plan)

    sizes = StateSizes(plan.seqs, program.vocab_size)
    mask_words = -(-program.vocab_size // 32)

    def sampler(nbytes: int) -> int:
        return arena.take("sampler", nbytes, "sampler state").address

    parameters, histories = sampler(sizes.parameters), sampler(sizes.histories)
    bias_ids, biases, stops = sampler(sizes.biases), sampler(sizes.biases), sampler(sizes.stops)
    bests, tokens = sampler(8 * sizes.chunks() * plan.samples), sampler(4 * plan.samples)
    last_tokens, masks = sampler(4 * plan.seqs), sampler(4 * plan.samples * mask_words)
    scores = sampler(plan.samples * (16 + 8 + 8 * MAX_TOP))

    tables = arena.take("block tables and metadata", 4 * plan.seqs * plan.table_stride).address
    metadata = arena.take("block tables and metadata", plan.layout.nbytes).address
    starts = arena.take("block tables and metadata", 4 * plan.start_words).address
    partial = max((p.partial_bytes for p in plan.decode.values()), default=0)
    arrivals = max((p.arrivals_bytes for p in plan.decode.values()), default=0)
    partial_at = arena.take("attention workspace", partial).address
    arrivals_at = arena.take("attention workspace", arrivals).address
    gemm = plan.lines.get("cuBLAS workspace", 0)
    gemm_workspace = arena.take("cuBLAS workspace", gemm).address if gemm else 0
    scratch = {name: arena.take("scratch of ops", n, name).address for name, n in plan.scratch.items()}
    line = state_line(plan.seqs)
    states = {s.name: arena.take(line, 4 * s.elements * plan.seqs, s.name).address for s in program.states}
    caches: dict[str, tuple[int, int]] = {}
    first = last = 0
    for cache in program.caches:
        rows = plan.num_blocks * BLOCK * cache.heads
        keys = arena.take("kv cache", ELEMENT * rows * cache.key_dim, cache.name)
        values = arena.take("kv cache", ELEMENT * rows * cache.value_dim, cache.name)
        first = first or keys.address
        last = values.address + values.nbytes
        caches[cache.name] = keys.address, values.address
    addresses = Addresses(
        weights=weights,
        buffers=buffers,
        caches=caches,
        ropes=ropes,
        metadata=metadata,
        tables=tables,
        partial=partial_at,
        arrivals=arrivals_at,
        logits=logits,
        scaled=scaled,
        bests=bests,
        tokens=tokens,
        last_tokens=last_tokens,
        parameters=parameters,
        histories=histories,
        bias_ids=bias_ids,
        biases=biases,
        stops=stops,
        masks=masks,
        gemm_workspace=gemm_workspace,
        scratch=scratch,
        states=states,
    )
    shape = shape_of(program, plan)
    return DeviceState(
        addresses=addresses,
        shape=shape,
        places=places,
        start_entries=starts,
        logprobs=LogprobArrays(plan.samples, scores, scores + 16 * plan.samples),
        kv=Range("kv cache", first, last - first),
    )


def shape_of(program: Program, plan: MemoryPlan) -> Shape:
    """Capacities and strides of a plan."""
    return Shape(
        tokens=plan.tokens,
        samples=plan.samples,
        seqs=plan.seqs,
        vocab=program.vocab_size,
        logits_stride=-(-program.vocab_size // 4) * 4,
        table_stride=plan.table_stride,
        history_stride=StateSizes(plan.seqs, program.vocab_size).history_stride,
        mask_words=-(-program.vocab_size // 32),
        kv_blocks=plan.num_blocks,
    )


def clear_state(stream: Stream, state: DeviceState, plan: MemoryPlan) -> None:
    """Zeroes what kernels expect zeroed: counters, tables and the slots' parameters."""
    at = state.addresses
    arrivals = max((p.arrivals_bytes for p in plan.decode.values()), default=0)
    sizes = StateSizes(plan.seqs, state.shape.vocab)
    for address, nbytes in (
        (at.arrivals, arrivals),
        (at.tables, 4 * plan.seqs * plan.table_stride),
        (at.parameters, sizes.parameters),
        (at.last_tokens, 4 * plan.seqs),
        (at.tokens, 4 * plan.samples),
        (at.metadata, plan.layout.nbytes),
        *((at.scratch[name], nbytes) for name, nbytes in plan.scratch.items()),
    ):
        if nbytes:
            stream.fill_bytes(address, 0, nbytes)


def send_ropes(stream: Stream, state: DeviceState, plan: MemoryPlan) -> None:
    """Computes the rotary tables on the host and copies them to the device."""
    for rope, (cos_at, sin_at) in state.addresses.ropes.items():
        for table, address in zip(rope.table(plan.table_stride * BLOCK), (cos_at, sin_at), strict=True):
            flat = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
            staging = Pinned(flat.nbytes)
            staging.array[:] = flat
            stream.copy_to_device(address, staging.address, flat.nbytes)
            stream.sync()
            staging.close()


def _rope_ranges(arena: Arena, program: Program, plan: MemoryPlan) -> dict[Rope, tuple[int, int]]:
    found: dict[Rope, tuple[int, int]] = {}
    for rope in ropes_of(program):
        nbytes = 4 * plan.table_stride * BLOCK * (rope.dim // 2)
        cos = arena.take("rope tables", nbytes)
        sin = arena.take("rope tables", nbytes)
        found[rope] = cos.address, sin.address
    return found
