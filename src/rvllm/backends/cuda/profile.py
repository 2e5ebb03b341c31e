"""Where a decode step's time goes: every kernel of it, chained over the layers, beside its floor.

Launches that are equal but for their layer are captured together into one graph, in the step's order and
with programmatic dependent launch, and replayed: distinct weights, so nothing is served from a cache that
a real step would not have. What the whole step takes beyond their sum is what launches wait for each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ctypes import c_uint64
from dataclasses import dataclass
from statistics import median

import numpy as np

from rvllm.backends.base import KV_BLOCK, SamplingSpec, SlotStart, StepBatch
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Graph, Launch, Stream
from rvllm.backends.cuda.device.graphs import capture
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.program.cost import Cost, StepShape, op_cost
from rvllm.program.ops.dense import Program

REPLAYS = 15
READ_KERNEL = "sm80_stream_read"
MATMUL_RATE = 798e12  # operations a second: an 8192^3 bfloat16 product by cuBLAS on an H100, random data


@dataclass(frozen=True)
class Row:
    """Launches of one make: `count` a step; `seconds` of one, as the chain runs it; the cost of one."""

    op: str
    kernel: str
    grid: tuple[int, int, int]
    count: int
    seconds: float
    cost: Cost


@dataclass(frozen=True)
class Profile:
    """One decode step of `seqs` sequences with `context` tokens each.

    step: seconds of the whole step as it is served. bandwidth: bytes a second of a plain read in this run.
    """

    seqs: int
    context: int
    rows: list[Row]
    step: float
    bandwidth: float

    def floor(self, cost: Cost) -> float:
        """Seconds below which no kernel could go."""
        return cost.floor_seconds(self.bandwidth, MATMUL_RATE)

    @property
    def total(self) -> Cost:
        return sum((row.cost for row in self.rows for _ in range(row.count)), Cost())


def make_of(planned: Planned) -> str:
    """What launches of all layers have in common."""
    return re.sub(r"layers\.\d+\.", "", f"{planned.op}|{planned.kernel}")


def time_graph(stream: Stream, graph: Graph) -> float:
    """Median device seconds of one replay, warm."""
    began, ended = Event(), Event()
    times = []
    for turn in range(REPLAYS + 3):
        began.record(stream)
        graph.launch(stream)
        ended.record(stream)
        ended.wait()
        if turn >= 3:
            times.append(ended.seconds_since(began))
    began.close()
    ended.close()
    return median(times)


def cost_of(op: str, costs: Mapping[str, Cost]) -> Cost:
    """The cost of a launch of this name: of its stage, or of all those whose launches were joined."""
    if op in costs:
        return costs[op]
    return sum((cost for name, cost in costs.items() if f" + {name} + " in f" + {op} + "), Cost())


def profile_launches(
    planned: Sequence[Planned],
    costs: Mapping[str, Cost],
    catalog: Catalog,
    stream: Stream,
    counts: Counts,
    pdl: bool,
) -> tuple[list[Row], float]:
    """(rows in the order of first use, median seconds of the whole step). costs: by stage name.

    A stage of several launches has its cost on the last of them.
    """
    makes: dict[str, list[Planned]] = {}
    last = {launch.op: launch for launch in planned}
    for launch in planned:
        makes.setdefault(make_of(launch), []).append(launch)
    rows = []
    for launches in makes.values():
        # A short chain is repeated, so that one replay is long beside the cost of launching a graph.
        repeats = max(1, 28 // len(launches))
        graph = capture(launches * repeats, catalog, stream, counts, pdl)
        seconds = time_graph(stream, graph) / (len(launches) * repeats)
        graph.close()
        first = launches[0]
        cost = cost_of(first.op, costs) if last[first.op] is first else Cost()
        op = re.sub(r"layers\.\d+\.", "", first.op)
        rows.append(Row(op, first.kernel, first.grid(counts), len(launches), seconds, cost))
    whole = capture(planned, catalog, stream, counts, pdl)
    step = time_graph(stream, whole)
    whole.close()
    return rows, step


def stream_rate(catalog: Catalog, stream: Stream, source: int, nbytes: int, sink: int, blocks: int) -> float:
    """Bytes a second at which a plain kernel reads device memory: what bounds a decode step from below.

    sink: a word of device memory that may change.
    """
    launch = Launch(catalog[READ_KERNEL], 512, 0, [source, c_uint64(nbytes // 16), sink], pdl=False)
    stream.begin_capture()
    launch.run(stream, (blocks, 1, 1))
    graph = stream.end_capture()
    seconds = time_graph(stream, graph)
    graph.close()
    return nbytes / seconds


def stage_cost(program: Program, stage: Stage, shape: StepShape) -> Cost:
    """Bytes and operations of a stage; buffers that only its own ops see cost nothing."""
    ops = [op_cost(program, op, shape) for op in stage.ops]
    buffers = {b.name: b for b in (*stage.reads, *stage.writes)}.values()
    return Cost(
        weight_bytes=sum(c.weight_bytes for c in ops),
        activation_bytes=sum(shape.rows(b) * b.width * b.dtype.size for b in buffers),
        kv_bytes=sum(c.kv_bytes for c in ops),
        flops=sum(c.flops for c in ops),
    )


def decode_batch(seqs: int, context: int, vocab: int) -> StepBatch:
    """A decode step of `seqs` sequences with `context` tokens each, random tokens and their own blocks."""
    rng = np.random.default_rng(0)
    blocks = -(-context // KV_BLOCK)
    slots = np.arange(seqs, dtype=np.int32)
    table = np.stack(
        [np.repeat(slots, blocks), np.tile(np.arange(blocks), seqs), np.arange(seqs * blocks)], axis=1
    )
    return StepBatch(
        step=0,
        slots=slots,
        query_lens=np.ones(seqs, dtype=np.int32),
        starts=np.full(seqs, context - 1, dtype=np.int32),
        tokens=rng.integers(0, vocab, seqs).astype(np.int32),
        sample=np.ones(seqs, dtype=np.bool_),
        started=[SlotStart(s, SamplingSpec(), np.zeros(1, dtype=np.int32), 1) for s in range(seqs)],
        new_blocks=table.astype(np.int32),
    )
