"""Sentence encoders on the GPU: whole texts in, one vector each out, a graph per padded number of tokens.

Nothing is cached between steps, so there are no blocks, slots or samplers here; kernels, weights and graphs
are those of the other backend.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rvllm.backends.base import KV_BLOCK, Limits, Progress, StepBatch
from rvllm.backends.cuda.buckets import bucket_of
from rvllm.backends.cuda.device.driver import Graph
from rvllm.backends.cuda.device.graphs import GraphCache, Key
from rvllm.backends.cuda.encoder_plan import EncoderPlan
from rvllm.backends.cuda.layout.metadata import SampledRows
from rvllm.backends.cuda.loaded_model import Gpu, OpenDevice
from rvllm.backends.cuda.ops.encoder.plan import text_tiles
from rvllm.backends.cuda.pooling_runner import PoolingRunner, Sent, pooled_rows
from rvllm.backends.cuda.tuning.start import strategy_for
from rvllm.backends.heads import Head
from rvllm.config import EngineConfig
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import AddPositions
from rvllm.telemetry.stats import StepKernel
from rvllm.weights.checkpoint import Checkpoint

_NO_UPDATES = np.zeros((0, 3), dtype=np.int32)


class CudaEncoder(PoolingRunner):
    """An encoder loaded onto a GPU (see `rvllm.backends.base.Encoder`)."""

    _graphs: GraphCache

    def __init__(self, gpu: Gpu, plan: EncoderPlan, head: Head | None = None) -> None:
        limits = Limits(
            max_num_seqs=plan.seqs,
            max_num_batched_tokens=plan.tokens,
            max_model_len=plan.longest,
            block_size=KV_BLOCK,
            num_blocks=0,
            pipeline_depth=1,
        )
        at = plan.addresses
        super().__init__(gpu, limits, (at.metadata, plan.layout.nbytes), pooled_rows(plan.program, at), head)
        self._plan = plan
        self._graphs = GraphCache(gpu.catalog, gpu.stream)
        self._last: Key = ("texts", 0)
        typed = [op.kinds for op in plan.program.ops if isinstance(op, AddPositions) and op.kinds]
        self._several_kinds = any(kinds.shape[0] > 1 for kinds in typed)

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
        found = OpenDevice.for_program(program, config)
        head = Head.load(program, checkpoint, config.seed)
        strategy = strategy_for(program, config, found.facts, report)
        plan = EncoderPlan.make(program, config, found.facts, found.budget, strategy)
        with found.staging(checkpoint) as staging:
            gpu, at = Gpu.load(
                found, plan.kernels(), plan, plan.wanted, program.dtype, checkpoint, config.seed, report,
                staging, "workspace",
            )  # fmt: skip
        encoder = CudaEncoder(gpu, replace(plan, addresses=at), head)
        if config.capture_graphs == "eager":
            report(0.0, "capturing graphs")
            for size in plan.sizes():
                encoder.graph(size)
        return encoder

    def _send(self, batch: StepBatch) -> Sent:
        plan = self._plan
        size = bucket_of(plan.sizes(), batch.num_tokens)
        graph = self.graph(size)
        layout = plan.layout_of(size)
        tiles = text_tiles(batch.query_lens, plan.rows)
        words = self._metadata.array.view(np.int32)
        used = layout.pack(batch, _NO_UPDATES, SampledRows.of(batch), tiles, words)
        layout.pack_kinds(batch, words, self._several_kinds)
        return graph, used

    def graph(self, size: int) -> Graph:
        """The graph of steps of up to `size` (a padded size) tokens, captured on first use."""
        self._last = ("texts", size)
        counts = self._plan.counts(size)
        return self._graphs.get("texts", size, self._plan.launches, counts)

    def last_kernels(self) -> list[StepKernel]:
        return self._graphs.kernels(self._last)
