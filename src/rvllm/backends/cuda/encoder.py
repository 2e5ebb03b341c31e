"""Sentence encoders on the GPU: whole texts in, one vector each out, a graph per padded number of tokens.

Nothing is cached between steps, so there are no blocks, slots or samplers here; kernels, weights and graphs
are those of the other backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import LedgerLine, Limits, StepBatch, StepKernel, StepResult, grouped
from rvllm.backends.cuda.addresses import Addresses, Shape
from rvllm.backends.cuda.arena import ALIGNMENT, Arena
from rvllm.backends.cuda.attention import prefill_tiles
from rvllm.backends.cuda.buckets import bucket_of, token_buckets
from rvllm.backends.cuda.catalog import Catalog
from rvllm.backends.cuda.chip import Chip
from rvllm.backends.cuda.cublas import WORKSPACE
from rvllm.backends.cuda.driver import Device, DeviceFacts, Event, Graph, Pinned, Stream
from rvllm.backends.cuda.fuse import Stage, fuse
from rvllm.backends.cuda.graphs import distinct
from rvllm.backends.cuda.launches import Counts, Planned, bind, kernel_names
from rvllm.backends.cuda.loader import Loader, fill_dummy
from rvllm.backends.cuda.lowering import Lowering, scratch_of
from rvllm.backends.cuda.memory import GB, Budget, budget_of
from rvllm.backends.cuda.metadata import Layout, SampledRows
from rvllm.backends.cuda.placement import Wanted, wanted_weights
from rvllm.backends.cuda.supported import check_device, check_supported
from rvllm.config import EngineConfig, kernel_cache_dir
from rvllm.errors import CapacityError, UsageError
from rvllm.kernels.encoder_manifest import TEXT_ROWS
from rvllm.program.dtypes import DType
from rvllm.program.encoder import Pool
from rvllm.program.memory import Workspace, plan_workspace
from rvllm.program.ops import Program
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import find_tensor

TOKENS = 16384  # of the largest step, unless asked otherwise
LEAST_WORKSPACE = 48 << 20  # weights pass through the workspace when they are loaded
Progress = Callable[[float, str], None]
_NO_UPDATES = np.zeros((0, 3), dtype=np.int32)


@dataclass(frozen=True)
class EncoderPlan:
    """Capacities, stages and sizes of an encoder on one GPU; planning touches no device.

    lines: bytes of the arena by name. seqs: texts of the largest step; longest: tokens of the longest text.
    """

    program: Program
    chip: Chip
    stages: list[Stage]
    wanted: list[Wanted]
    workspace: Workspace
    layout: Layout
    lines: dict[str, int]
    scratch: dict[str, int]
    tokens: int
    seqs: int
    longest: int
    strategy: str

    @staticmethod
    def make(program: Program, config: EngineConfig, facts: DeviceFacts, budget: Budget) -> EncoderPlan:
        """Raises UsageError when the longest text finds no step, CapacityError when memory is short."""
        if config.max_model_len is not None and config.max_model_len > program.max_position:
            raise UsageError(
                f"--max-model-len {config.max_model_len} is more than the model's "
                f"{program.max_position} positions"
            )
        longest = config.max_model_len or program.max_position
        tokens = config.max_num_batched_tokens or max(TOKENS, longest)
        if tokens < longest:
            raise UsageError(
                f"--max-num-batched-tokens {tokens}: a step must hold the longest text whole, {longest} "
                "tokens; raise it or lower --max-model-len"
            )
        native = config.gemm_strategy == "native"
        seqs = config.max_num_seqs
        stages = fuse(program, gated_epilogue=native)
        wanted = wanted_weights(stages, "packed" if native else "table")
        workspace = plan_workspace(stages, tokens, seqs)
        scratch = scratch_of(program, tokens, seqs)
        layout = Layout(tokens, seqs, samples=0, tiles=_tiles(tokens, seqs), updates=0)
        lines = {
            "weights": sum(_aligned(w.nbytes) for w in wanted),
            "workspace": _aligned(max(workspace.nbytes, LEAST_WORKSPACE)),
            "metadata": _aligned(layout.nbytes),
        }
        if scratch:
            lines["scratch of ops"] = sum(_aligned(n) for n in scratch.values())
        if not native:
            lines["cuBLAS workspace"] = _aligned(WORKSPACE)
        needed = sum(lines.values())
        if needed > budget.ours:
            parts = ", ".join(f"{name} {nbytes / GB:.2f}" for name, nbytes in lines.items())
            raise CapacityError(
                f"GPU memory: {needed / GB:.2f} GB are needed ({parts}), of {budget.total / GB:.2f} GB "
                f"{budget.ours / GB:.2f} GB are ours; raise --gpu-memory-utilization or lower "
                "--max-num-batched-tokens"
            )
        return EncoderPlan(
            program=program,
            chip=Chip(facts.capability, facts.sm_count, facts.smem_per_block),
            stages=stages,
            wanted=wanted,
            workspace=workspace,
            layout=layout,
            lines=lines,
            scratch=scratch,
            tokens=tokens,
            seqs=seqs,
            longest=longest,
            strategy=config.gemm_strategy,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return sum(self.lines.values())

    def sizes(self) -> list[int]:
        """Padded token counts, one graph each."""
        return token_buckets(self.tokens)

    def counts(self, tokens: int) -> Counts:
        """What a step of up to `tokens` tokens can hold."""
        texts = min(tokens, self.seqs)
        return Counts(tokens, texts, texts)

    def launches(self, tokens: int, addresses: Addresses) -> list[Planned]:
        """A step of up to `tokens` tokens. Raises MissingKernelError for ops without a kernel."""
        counts = self.counts(tokens)
        shape = Shape(self.tokens, self.seqs, self.seqs, self.program.vocab_size, 0, 0, 0, 0)
        layout = replace(self.layout, tiles=_tiles(tokens, counts.seqs))
        lowering = Lowering(
            self.program.dtype, self.chip, shape, addresses, layout, counts, {}, None, self.strategy
        )
        return lowering.lower(self.stages)

    def kernels(self) -> list[str]:
        """Every kernel any step can need."""
        nowhere = self.addresses({}, 0, 0, 0, dict.fromkeys(self.scratch, 0))
        few = replace(self, stages=distinct(self.stages))
        names = [name for size in self.sizes() for name in kernel_names(few.launches(size, nowhere))]
        return list(dict.fromkeys(names))

    def addresses(
        self, weights: dict[int, int], workspace: int, metadata: int, gemm: int, scratch: dict[str, int]
    ) -> Addresses:
        """Where things lie; weights by their place in `wanted`, absent ones nowhere."""
        nothing = {f.name: 0 for f in fields(Addresses) if f.type == "int"}
        given = {"metadata": metadata, "gemm_workspace": gemm}
        maps: dict[str, Any] = {f.name: {} for f in fields(Addresses) if f.type != "int"}
        maps["weights"] = {(w.weight.name, w.form): weights.get(i, 0) for i, w in enumerate(self.wanted)}
        maps["buffers"] = {n: workspace + p.offset for n, p in self.workspace.placements.items()}
        maps["scratch"] = scratch
        return Addresses(**{**nothing, **given, **maps})


class CudaEncoder:
    """An encoder loaded onto a GPU (see `rvllm.backends.base.Backend`)."""

    def __init__(
        self,
        device: Device,
        facts: DeviceFacts,
        arena: Arena,
        catalog: Catalog,
        stream: Stream,
        plan: EncoderPlan,
        addresses: Addresses,
        ledger: list[LedgerLine],
    ) -> None:
        self._device, self._facts, self._arena, self._catalog = device, facts, arena, catalog
        self._stream, self._plan, self._at, self._ledger = stream, plan, addresses, ledger
        pool = next(op for op in reversed(plan.program.ops) if isinstance(op, Pool))
        self._width, self._vectors = pool.out.width, addresses.buffers[pool.out.name]
        self._metadata = Pinned(plan.layout.nbytes)
        self._out = Pinned(4 * plan.seqs * self._width)
        self._began, self._ended = Event(), Event()
        self._graphs: dict[int, Graph] = {}
        self._kernels: dict[int, list[StepKernel]] = {}
        self._last = 0
        self._steps, self._texts, self._busy, self._capture_seconds = 0, 0, 0.0, 0.0
        self._limits = Limits(
            max_num_seqs=plan.seqs,
            max_num_batched_tokens=plan.tokens,
            max_model_len=plan.longest,
            block_size=16,
            num_blocks=0,
            pipeline_depth=1,
        )

    @staticmethod
    def load(
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        progress: Progress | None = None,
    ) -> CudaEncoder:
        """Resolves kernels, takes the memory, loads weights; None as checkpoint fills random ones.

        Raises MissingKernelError, CapacityError or UsageError before any weight is read.
        """
        report = progress or (lambda fraction, text: None)
        check_supported(program, config)
        device = Device()
        facts = device.facts()
        check_device(facts)
        free, total = device.free_memory()
        plan = EncoderPlan.make(program, config, facts, budget_of(config, free, total))
        catalog = Catalog(facts.capability, kernel_cache_dir())
        catalog.require(
            [*plan.kernels(), *_loading_kernels(program, checkpoint)],
            lambda done, count: report(done / count, "compiling kernels"),
        )
        after_modules, _ = device.free_memory()
        arena, stream = Arena(plan.nbytes), Stream()
        places = [(w, arena.take("weights", w.nbytes, w.weight.name).address) for w in plan.wanted]
        workspace = arena.take("workspace", plan.lines["workspace"])
        metadata = arena.take("metadata", plan.layout.nbytes).address
        gemm = plan.lines.get("cuBLAS workspace", 0)
        gemm_at = arena.take("cuBLAS workspace", gemm).address if gemm else 0
        scratch = {name: arena.take("scratch of ops", n, name).address for name, n in plan.scratch.items()}
        stream.fill_bytes(metadata, 0, plan.layout.nbytes)
        for name, address in scratch.items():
            stream.fill_bytes(address, 0, plan.scratch[name])
        if checkpoint is None:
            fill_dummy(catalog, stream, program.dtype, places, config.seed)
        else:
            loader = Loader(catalog, stream, program.dtype, workspace)
            try:
                loader.load(places, checkpoint, report)
            finally:
                loader.close()
        ledger = [
            LedgerLine("in use before (driver, context, others)", total - free),
            LedgerLine("kernels", free - after_modules),
            *arena.ledger(),
        ]
        weights = {i: address for i, (_, address) in enumerate(places)}
        addresses = plan.addresses(weights, workspace.address, metadata, gemm_at, scratch)
        encoder = CudaEncoder(device, facts, arena, catalog, stream, plan, addresses, ledger)
        if config.capture_graphs == "eager":
            report(0.0, "capturing graphs")
            for size in plan.sizes():
                encoder.graph(size)
        return encoder

    @property
    def name(self) -> str:
        """The GPU's name."""
        return self._facts.name

    @property
    def limits(self) -> Limits:
        """Capacities, fixed for the backend's life."""
        return self._limits

    def ledger(self) -> list[LedgerLine]:
        """Device memory line by line, and what the driver says is left."""
        return [*self._ledger, LedgerLine("free", self._device.free_memory()[0])]

    def embed(self, batch: StepBatch) -> NDArray[np.float32]:
        """One pooled vector a text, float32 [S, width]; see `Backend.embed`."""
        plan, count = self._plan, len(batch.slots)
        size = bucket_of(plan.sizes(), batch.num_tokens)
        graph = self.graph(size)
        layout = replace(plan.layout, tiles=_tiles(size, plan.counts(size).seqs))
        tiles = prefill_tiles(batch.query_lens, batch.query_lens, 0, 1, TEXT_ROWS)
        words = self._metadata.array.view(np.int32)
        used = layout.pack(batch, _NO_UPDATES, SampledRows.of(batch), tiles, words)
        self._stream.copy_to_device(self._at.metadata, self._metadata.address, used)
        self._began.record(self._stream)
        graph.launch(self._stream)
        self._ended.record(self._stream)
        nbytes = 4 * count * self._width
        self._stream.copy_to_host(self._out.address, self._vectors, nbytes)
        self._stream.sync()
        self._steps += 1
        self._texts += count
        self._busy += self._ended.seconds_since(self._began)
        return self._out.array[:nbytes].view(np.float32).reshape(count, self._width).copy()

    def graph(self, size: int) -> Graph:
        """The graph of steps of up to `size` (a padded size) tokens, captured on first use."""
        self._last = size
        if size not in self._graphs:
            started = time.perf_counter()
            planned = self._plan.launches(size, self._at)
            self._kernels[size] = grouped((p.op, p.kernel, p.why) for p in planned)
            bound = bind(planned, self._catalog, pdl=self._facts.capability >= 90)
            self._stream.begin_capture()
            bound.run(self._stream, self._plan.counts(size))
            self._graphs[size] = self._stream.end_capture()
            self._capture_seconds += time.perf_counter() - started
        return self._graphs[size]

    def launch(self, batch: StepBatch) -> object:
        """Refused: an encoder draws no tokens. Raises UsageError."""
        raise UsageError(f"{self._plan.program.architecture} gives embeddings and generates no text")

    def collect(self, handle: object) -> StepResult:
        """Refused, as `launch` is."""
        raise UsageError(f"{self._plan.program.architecture} gives embeddings and generates no text")

    def last_kernels(self) -> list[StepKernel]:
        """Kernels of the last step; see `Backend.last_kernels`."""
        return self._kernels.get(self._last, [])

    def decode_floor(self, seqs: int, context: int) -> float | None:
        """Nothing is decoded."""
        return None

    def stats(self) -> dict[str, float]:
        """Steps, texts, device seconds and graphs."""
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_texts_total": self._texts,
            "rvllm:backend_busy_seconds_total": self._busy,
            "rvllm:cuda_graphs": len(self._graphs),
            "rvllm:cuda_graph_capture_seconds_total": self._capture_seconds,
        }

    def close(self) -> None:
        """Gives everything back."""
        self._stream.sync()
        for graph in self._graphs.values():
            graph.close()
        for pinned in (self._metadata, self._out):
            pinned.close()
        self._began.close()
        self._ended.close()
        self._arena.close()
        self._catalog.close()
        self._stream.close()
        self._device.close()


def _loading_kernels(program: Program, checkpoint: Checkpoint | None) -> list[str]:
    if checkpoint is None:
        tag = "bf16" if program.dtype is DType.BF16 else "f16"
        return [f"sm80_{tag}_fill_random", "sm80_f32_fill_random"]
    found = (find_tensor(part, checkpoint) for weight in program.weights for part in weight.parts)
    return Loader.kernels(program.dtype, [info.type for info in found if info is not None])


def _tiles(tokens: int, texts: int) -> int:
    """Blocks of query rows that `texts` texts of together `tokens` tokens can have."""
    return tokens // TEXT_ROWS + texts


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
