"""The CUDA backend: a program replayed as graphs on one NVIDIA GPU, sampling included.

`launch` packs a step's metadata into pinned memory, queues its copy and its graphs and returns; `collect`
waits for the step's event and reads the drawn tokens. Up to `pipeline_depth` steps are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import (
    COPY,
    KV_BLOCK,
    RESTORE,
    SAVE,
    LedgerLine,
    Limits,
    Progress,
    StepBatch,
    StepResult,
)
from rvllm.backends.cuda.device.driver import Event, Pinned
from rvllm.backends.cuda.device.host_blocks import COPY_RATE, HostBlocks, KeptBlocks, copy_block, runs_of
from rvllm.backends.cuda.device.host_memory import ComingHostMemory
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.formats.choose import kept, say_expanded
from rvllm.backends.cuda.in_flight import KERNEL as SEND_KERNEL
from rvllm.backends.cuda.in_flight import NOTHING, InFlightStep, Sender
from rvllm.backends.cuda.layout.allocations import WEIGHTS
from rvllm.backends.cuda.layout.memory import KV_CACHE
from rvllm.backends.cuda.layout.metadata import SampledRows, Sampling, leading_decodes
from rvllm.backends.cuda.layout.packed import ELEMENT
from rvllm.backends.cuda.loaded_model import Gpu, OpenDevice
from rvllm.backends.cuda.ops.attention.plan import prefill_tiles
from rvllm.backends.cuda.ops.sampling.logprobs import KERNEL as LOGPROBS_KERNEL
from rvllm.backends.cuda.ops.sampling.logprobs import Scorer
from rvllm.backends.cuda.ops.sampling.slots import DRAW, MAX_DRAWN, left_by_head
from rvllm.backends.cuda.ops.sampling.starts import KERNEL as START_KERNEL
from rvllm.backends.cuda.ops.sampling.starts import Starter
from rvllm.backends.cuda.profile import (
    READ_KERNEL,
    Profile,
    decode_batch,
    profile_launches,
    stage_cost,
    stream_rate,
)
from rvllm.backends.cuda.step_planner import GraphBook, StepPlanner
from rvllm.backends.cuda.tuning.start import strategy_for
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, RvllmError, UsageError
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.ops.dense import Program
from rvllm.telemetry.stats import StepKernel
from rvllm.telemetry.step_trace import TracedStep
from rvllm.weights.checkpoint import Checkpoint

_NO_TILES = np.zeros((0, 2), dtype=np.int32)
DEPTH = 2  # steps under way: the next is launched before this one's tokens are read
SPARE_BYTES = 128 << 20  # of device memory: graphs are not captured ahead of need with less


class CudaBackend:
    """A program loaded onto a GPU (see `rvllm.backends.base.Generator`)."""

    def __init__(
        self,
        gpu: Gpu,
        planner: StepPlanner,
        program: Program,
        check_memory: bool = False,
        num_cpu_blocks: int = 0,
        max_mixed_tokens: int | None = None,
    ) -> None:
        plan, shape, at = planner.memory, planner.memory.shape, planner.addresses
        self._gpu, self._ledger = gpu, gpu.ledger()
        self._facts, self._catalog, self._stream = gpu.facts, gpu.catalog, gpu.stream
        self._planner, self._at, self._shape, self._program = planner, at, shape, program
        self._graphs = GraphBook(planner, gpu.catalog, gpu.stream)
        caches = [
            (address, KV_BLOCK * cache.heads * cache.row_bytes(dim, ELEMENT))
            for cache in program.caches
            for address, dim in zip(at.caches[cache.name], (cache.key_dim, cache.value_dim), strict=True)
            if dim
        ]
        end = gpu.arena.base + gpu.arena.nbytes
        self._before_caches = min((address for address, _ in caches), default=end) - gpu.arena.base
        self._constant = plan.lines[WEIGHTS]  # they lie first, and never change
        self._caches, self._cache_runs = caches, runs_of(caches)
        self._host = HostBlocks(caches, num_cpu_blocks) if num_cpu_blocks else None
        self._kept: KeptBlocks | None = None  # in sleep
        self.name = gpu.facts.name
        self.limits = Limits(
            max_num_seqs=shape.seqs,
            max_num_batched_tokens=shape.tokens,
            max_mixed_tokens=min(max_mixed_tokens or planner.mixed_tokens(), shape.tokens),
            max_model_len=plan.max_model_len,
            block_size=KV_BLOCK,
            num_blocks=shape.kv_blocks,
            pipeline_depth=DEPTH,
            num_cpu_blocks=num_cpu_blocks,
            block_move_seconds=sum(width for _, width in caches) / COPY_RATE,
            block_copies=not program.states,
            prefix_reuse=not program.states,
            num_snapshots=plan.snapshots,
        )
        self._ring = [InFlightStep.create(plan) for _ in range(DEPTH + 2)]
        self._starter = Starter(gpu.catalog, gpu.stream, at, shape, plan.start_words)
        self._scorer = Scorer(gpu.catalog, gpu.stream, at, shape)
        self._sender = Sender(gpu.catalog, gpu.stream, at.metadata)
        self._left_by_head = np.zeros(shape.seqs, dtype=np.int8)  # by slot
        self._check_memory, self._free_before, self._graphs_before = check_memory, -1, 0
        self._last: InFlightStep | None = None
        self._steps = self._gaps = 0
        self._busy = self._idle = self._decode_busy = 0.0

    @staticmethod
    def load(
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        progress: Progress | None = None,
    ) -> CudaBackend:
        """Resolves kernels, takes the memory, loads weights; None as checkpoint fills random ones.

        Raises MissingKernelError, CapacityError or UsageError before any weight is read.
        """
        report = progress or (lambda fraction, text: None)
        report(0.0, "opening the GPU")
        found = OpenDevice.for_program(program, config)
        with found.staging(checkpoint) as staging:
            return CudaBackend._load_on(found, program, checkpoint, config, report, staging)

    @staticmethod
    def _load_on(
        found: OpenDevice,
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        report: Progress,
        staging: ComingHostMemory | None,
    ) -> CudaBackend:
        report(0.0, "planning")
        program = kept(program, checkpoint, config, found.facts)
        say_expanded(program, checkpoint, config)
        strategy = strategy_for(program, config, found.facts, report)
        planner, wanted = StepPlanner.plan(program, config, found.facts, found.budget, strategy)
        kernels = [*planner.kernels(), START_KERNEL, LOGPROBS_KERNEL, SEND_KERNEL]
        gpu, at = Gpu.load(
            found, kernels, planner.memory, wanted, program.dtype, checkpoint, config.seed, report, staging,
            KV_CACHE, config.enable_sleep_mode,
        )  # fmt: skip
        report(0.0, "buffers")
        backend = CudaBackend(
            gpu,
            replace(planner, addresses=at),
            program,
            config.check_device_memory,
            config.num_cpu_blocks,
            config.max_mixed_tokens,
        )
        if config.capture_graphs == "eager":
            report(0.0, "capturing graphs")
            backend.capture_all()
        return backend

    def ledger(self) -> list[LedgerLine]:
        """Device memory line by line, and what the driver says is left."""
        free, _ = self._gpu.device.free_memory()
        tier = [] if self._host is None else [LedgerLine("kv cache, pinned host memory", self._host.nbytes)]
        return [*self._ledger, LedgerLine("free", free), *tier]

    def capture_all(self) -> None:
        """Captures every graph now instead of on first use."""
        before, _ = self._gpu.device.free_memory()
        self._graphs.capture_all()
        self._stream.sync()
        after, _ = self._gpu.device.free_memory()
        self._ledger.append(LedgerLine("graphs", before - after))

    def prepare(self) -> bool:
        """See `Preparable`: captures a graph, while there is memory to spare."""
        free, _ = self._gpu.device.free_memory()
        return free > SPARE_BYTES and self._graphs.capture_next()

    def launch(self, batch: StepBatch) -> InFlightStep:
        """Queues a step; see `Generator.launch`."""
        flight = self._ring[self._steps % len(self._ring)]
        self._steps += 1
        rows = SampledRows.of(batch)
        decode = batch.num_tokens == len(batch.slots) == len(rows.rows) and not batch.prompt_logprobs
        flight.batch, flight.rows, flight.decode = batch, rows, decode
        flight.before = last = self._last
        flight.follows = last if decode and last is not None and last.decode and last.under_way else None
        for entry in batch.started:
            self._scorer.start(entry)
            self._left_by_head[entry.slot] = left_by_head(entry.sampling, self._shape.vocab)
        self._make_moves(batch)
        self._starter.start(batch.started)
        self._send_masks(flight)
        captured = self._graphs.seconds
        if decode:
            size = self._graphs.decode_size(len(batch.slots))
            graphs, layout, tiles = [self._graphs.decode(size)], self._planner.decode_layout(size), _NO_TILES
        else:
            size = self._graphs.body_size(batch.num_tokens)
            graphs = [self._graphs.body(size)]
            if len(rows.rows):
                graphs.append(self._graphs.head(len(rows.rows)))
            layout = self._planner.memory.layout
            tiles = self._tiles(batch)
        flight.padded, flight.capture_seconds = size, self._graphs.seconds - captured
        words = flight.metadata.array.view(np.int32)
        updates = self._starter.early_updates(batch.new_blocks, layout.updates)
        sampling = Sampling(self._best_only(batch, rows), self._at.parameters, flight.tokens.device_address)
        used = layout.pack(batch, updates, rows, tiles, words, sampling)
        self._sender.send(flight.metadata, used)
        flight.began.record(self._stream)
        for graph in graphs:
            graph.launch(self._stream)
        flight.ended.record(self._stream)
        self._scorer.launch(flight)
        flight.done.record(self._stream)
        self._last = flight
        return flight

    def _best_only(self, batch: StepBatch, rows: SampledRows) -> int:
        """What the head may leave instead of logits, for all rows of a step; see `Sampling`."""
        left = self._left_by_head[rows.slots]
        if batch.masks or batch.prompt_logprobs or not left.all():
            return 0
        most = int(left.max(initial=0))
        return 0 if most == DRAW and len(left) > MAX_DRAWN else most

    def _make_moves(self, batch: StepBatch) -> None:
        """Queues the copies before a step. Those on the device come last: what they write is in use from
        then on, and has been copied out before where that was wanted."""
        if self._program.states:
            self._copy_states(batch.moves.tolist())
            return
        copies = batch.moves[:, 0] == COPY
        if self._host is not None:
            after = self._end_of(batch.moves_after)
            self._host.move(batch.moves[~copies], batch.moves_ahead, after, self._stream)
        for block, to in batch.moves[copies, 1:].tolist():
            copy_block(self._cache_runs, block, to, self._stream)

    def _copy_states(self, moves: list[tuple[int, int, int]]) -> None:
        """Copies rows of recurrent states between slots and snapshots, which lie behind them."""
        for kind, slot, snapshot in moves:
            assert kind in (SAVE, RESTORE)
            kept = self._shape.seqs + snapshot
            target, source = (kept, slot) if kind == SAVE else (slot, kept)
            for state in self._program.states:
                base, width = self._at.states[state.name], 4 * state.elements
                self._stream.copy_on_device(base + target * width, base + source * width, width)

    def _end_of(self, step: int) -> Event | None:
        """The end of the last step under way that is not behind `step`; None where none is."""
        under_way = [f for f in self._ring if f.under_way and f.batch.step <= step]
        return max(under_way, key=lambda f: f.batch.step).ended if under_way else None

    def _tiles(self, batch: StepBatch) -> NDArray[np.int32]:
        """The blocks of query rows of sequences with several tokens; see `prefill_tiles`."""
        shape = self._planner.tiles
        if shape is None:
            return _NO_TILES
        kv_lens, first = batch.starts + batch.query_lens, leading_decodes(batch.query_lens)
        return prefill_tiles(batch.query_lens, kv_lens, first, shape.group, shape.rows)

    def collect(self, handle: InFlightStep) -> StepResult:
        """Waits for a launched step and reads what it drew."""
        batch, rows = handle.batch, handle.rows
        handle.done.wait()
        seconds = handle.ended.seconds_since(handle.began)
        self._account(handle, seconds)
        result = StepResult(batch.step, np.full(len(batch.slots), -1, dtype=np.int32), device_seconds=seconds)
        drawn = rows.slots >= 0
        tokens = handle.tokens.array.view(np.int32)[: len(rows.rows)]
        result.tokens[rows.seqs[drawn]] = tokens[drawn]
        self._scorer.read(handle, result)
        handle.batch, handle.follows = NOTHING, None
        if self._check_memory:
            self._prove_memory_flat()
        return result

    def describe(self, handle: InFlightStep, step: TracedStep) -> None:
        """See `Traceable`: what the step was padded to, and how long the device idled before it."""
        step.padded, step.capture = handle.padded, handle.capture_seconds
        step.graphs = "decode" if handle.decode else "body, head" if len(handle.rows.rows) else "body"
        if handle.before is not None:
            step.idle = handle.began.seconds_since(handle.before.ended)

    def _prove_memory_flat(self) -> None:
        """Raises RvllmError if device memory was taken since the last step by anything but a new graph."""
        free, graphs = self._gpu.device.free_memory()[0], len(self._graphs)
        taken = self._free_before - free
        if self._free_before >= 0 and taken > 0 and graphs == self._graphs_before:
            raise RvllmError(f"--check-device-memory: a step took {taken} bytes of device memory")
        self._free_before, self._graphs_before = free, graphs

    def _account(self, flight: InFlightStep, seconds: float) -> None:
        """Adds up busy time, and the gap before a decode step that was queued behind another."""
        self._busy += seconds
        if flight.follows is not None:
            self._idle += flight.began.seconds_since(flight.follows.ended)
            self._decode_busy += seconds
            self._gaps += 1

    def _send_masks(self, flight: InFlightStep) -> None:
        masks = flight.batch.masks
        if not masks:
            return
        words = self._shape.mask_words
        if flight.masks is None:
            flight.masks = Pinned(4 * words * self._shape.samples)
        image = flight.masks.array.view(np.uint32).reshape(-1, words)
        for row, s in enumerate(sorted(masks)):
            image[row] = masks[s]
        self._stream.copy_to_device(self._at.masks, flight.masks.address, 4 * words * len(masks))

    def profile(self, seqs: int, context: int) -> Profile:
        """Times every kernel of a decode step of `seqs` sequences with `context` tokens each.

        Nothing may be running. Raises UsageError when the KV cache is too small for the step.
        """
        blocks = -(-context // KV_BLOCK)
        if seqs > self.limits.max_num_seqs or seqs * blocks > self.limits.num_blocks:
            raise UsageError(
                f"--profile: {seqs} sequences of {context} tokens do not fit; see --max-num-seqs"
            )
        self._catalog.require([READ_KERNEL])
        for _ in range(2):  # leaves the step's metadata and slots on the device
            self.collect(self.launch(decode_batch(seqs, context, self._shape.vocab)))
        size = self._graphs.decode_size(seqs)
        shape = StepShape(seqs, 1, context)
        costs = {stage.name: stage_cost(self._program, stage, shape) for stage in self._planner.stages}
        rows, step = profile_launches(
            self._planner.decode(size),
            costs,
            self._catalog,
            self._stream,
            Counts(size, size, size),
            pdl=self._facts.capability >= 90,
        )
        arena, sink = self._gpu.arena, self._at.bests
        nbytes = min(arena.nbytes, 16 << 30)
        rate = stream_rate(self._catalog, self._stream, arena.base, nbytes, sink, 4 * self._facts.sm_count)
        return Profile(seqs, context, rows, step, rate)

    def last_kernels(self) -> list[StepKernel]:
        """Kernels of the step launched last; see `Backend.last_kernels`."""
        return self._graphs.last_kernels()

    def decode_floor(self, seqs: int, context: int) -> float | None:
        """Bytes of a decode step over the memory's peak rate, which the driver tells."""
        if not self._facts.memory_rate:
            return None
        return program_cost(self._program, StepShape(seqs, 1, context)).nbytes / self._facts.memory_rate

    def stats(self) -> dict[str, float]:
        """Steps, device seconds, and the idle gaps between consecutive decode steps."""
        spent = self._decode_busy + self._idle
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_busy_seconds_total": self._busy,
            "rvllm:decode_idle_seconds_total": self._idle,
            "rvllm:decode_idle_share": self._idle / spent if spent else 0.0,
            "rvllm:decode_gaps_total": self._gaps,
            "rvllm:cuda_graphs": len(self._graphs),
            **self._graphs.captured(),
            "rvllm:cuda_graph_capture_seconds_total": self._graphs.seconds,
        }

    def drop_caches(self, kept: Sequence[int] = ()) -> bool:
        """Gives all device memory back but kernels and graphs, which stay valid for the same addresses.

        What lies before the caches, the weights above all, is kept in pinned host memory, which stays taken,
        as are the blocks of `kept` until `take_caches`. False without --enable-sleep-mode, or where the host
        has no room.
        """
        self._stream.sync()
        if self._host is not None:
            self._host.sync()
        if not self._gpu.arena.sleeps:
            return False
        if kept:
            try:
                self._kept = KeptBlocks(self._caches, kept, self._stream)
            except CapacityError:
                return False
        if self._gpu.arena.sleep(self._before_caches, self._constant, self._stream):
            return True
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        return False

    def take_caches(self) -> None:
        """Takes the memory again, with what was kept. Raises CapacityError."""
        self._gpu.arena.wake(self._stream)
        if self._kept is not None:
            self._kept.bring_back(self._stream)
            self._kept = None
        self._free_before = -1

    def close(self) -> None:
        """Gives everything back."""
        self._stream.sync()
        self._graphs.close()
        for flight in self._ring:
            flight.close()
        for blocks in (self._host, self._kept):
            if blocks is not None:
                blocks.close()
        self._starter.close()
        self._gpu.close()
