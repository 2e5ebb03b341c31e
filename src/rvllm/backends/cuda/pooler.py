"""Decoders that pool texts on the GPU: each step is the prefill of whole texts, whose rows become vectors.

Kernels, weights and memory are those of the backend that generates. All layers use one cache, whose blocks
belong to the step alone. Checked in the emulator; it has not been run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK, Limits, Progress, StepBatch
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import kernel_names
from rvllm.backends.cuda.formats.choose import kept, say_expanded
from rvllm.backends.cuda.layout.memory import DEFAULT_TOKENS, KV_CACHE, Budget
from rvllm.backends.cuda.layout.metadata import SampledRows, leading_decodes
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.loaded_model import Gpu, OpenDevice
from rvllm.backends.cuda.ops.attention.plan import prefill_tiles
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.pooling_runner import PoolingRunner, Sent, pooled_rows
from rvllm.backends.cuda.step_planner import GraphBook, StepPlanner, distinct
from rvllm.backends.cuda.tuning.start import strategy_for
from rvllm.backends.heads import Head, without_head
from rvllm.backends.lengths import encoder_lengths
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.program.cost import kv_bytes_per_token
from rvllm.program.ops.dense import Program
from rvllm.telemetry.stats import StepKernel
from rvllm.weights.checkpoint import Checkpoint

MAX_UPDATES = 1 << 16  # block-table entries that a step's metadata holds
STAGING = 48 << 20  # bytes of the cache at least: weights pass through it when they are loaded


def plan_pooler(
    program: Program,
    config: EngineConfig,
    facts: DeviceFacts,
    budget: Budget,
    strategy: GemmStrategy | None = None,
) -> tuple[StepPlanner, list[PackedWeight]]:
    """`StepPlanner.plan` for steps of whole texts: the cache holds one step's tokens.

    Raises as it does, and UsageError where the longest text finds no step.
    """
    longest, tokens = encoder_lengths(program, config, DEFAULT_TOKENS)
    seqs = min(config.max_num_seqs, tokens)
    if -(-tokens // KV_BLOCK) + seqs > MAX_UPDATES:
        most = KV_BLOCK * (MAX_UPDATES - seqs)
        raise UsageError(f"--max-num-batched-tokens {tokens}: a step of texts has room for {most}")
    block_bytes = kv_bytes_per_token(program) * KV_BLOCK
    blocks = max(-(-tokens // KV_BLOCK) + seqs, -(-STAGING // block_bytes))
    config = replace(
        config, max_model_len=longest, max_num_batched_tokens=tokens, max_num_seqs=seqs, num_blocks=blocks
    )
    return StepPlanner.plan(without_head(program), config, facts, budget, strategy)


def body_kernels(planner: StepPlanner) -> list[str]:
    """Every kernel that a step of texts can need. Raises MissingKernelError where an op has none."""
    few = replace(planner, stages=distinct(planner.stages))
    names = [name for size in planner.token_sizes() for name in kernel_names(few.body(size))]
    return list(dict.fromkeys(names))


class CudaPooler(PoolingRunner):
    """A decoder that gives vectors or classes, loaded onto a GPU (see `rvllm.backends.base.Encoder`)."""

    _graphs: GraphBook

    def __init__(self, gpu: Gpu, planner: StepPlanner, program: Program, head: Head | None) -> None:
        plan, shape, at = planner.memory, planner.memory.shape, planner.addresses
        limits = Limits(
            max_num_seqs=shape.seqs,
            max_num_batched_tokens=shape.tokens,
            max_model_len=plan.max_model_len,
            block_size=KV_BLOCK,
            num_blocks=shape.kv_blocks,
            pipeline_depth=1,
        )
        super().__init__(gpu, limits, (at.metadata, plan.layout.nbytes), pooled_rows(program, at), head)
        self._planner = planner
        self._graphs = GraphBook(planner, gpu.catalog, gpu.stream)

    @staticmethod
    def load(
        program: Program,
        checkpoint: Checkpoint | None,
        config: EngineConfig,
        progress: Progress | None = None,
    ) -> CudaPooler:
        """Resolves kernels, takes the memory, loads weights; None as checkpoint fills random ones.

        Raises MissingKernelError, CapacityError or UsageError before any weight is read.
        """
        report = progress or (lambda fraction, text: None)
        found = OpenDevice.for_program(program, config)
        head = Head.load(program, checkpoint, config.seed)
        program = kept(without_head(program), checkpoint, config, found.facts)
        say_expanded(program, checkpoint, config)
        strategy = strategy_for(program, config, found.facts, report)
        planner, wanted = plan_pooler(program, config, found.facts, found.budget, strategy)
        with found.staging(checkpoint) as staging:
            gpu, at = Gpu.load(
                found, body_kernels(planner), planner.memory, wanted, program.dtype, checkpoint, config.seed,
                report, staging, KV_CACHE,
            )  # fmt: skip
        pooler = CudaPooler(gpu, replace(planner, addresses=at), program, head)
        if config.capture_graphs == "eager":
            report(0.0, "capturing graphs")
            for size in planner.token_sizes():
                pooler._graphs.body(size)
        return pooler

    def _send(self, batch: StepBatch) -> Sent:
        layout = self._planner.memory.layout
        blocks = text_blocks(batch.query_lens)
        graph = self._graphs.body(self._graphs.body_size(batch.num_tokens))
        words = self._metadata.array.view(np.int32)
        return graph, layout.pack(batch, blocks, SampledRows.of(batch), self._tiles(batch), words)

    def _tiles(self, batch: StepBatch) -> NDArray[np.int32]:
        shape = self._planner.tiles
        if shape is None:
            return np.zeros((0, 2), dtype=np.int32)
        lengths = batch.query_lens
        return prefill_tiles(lengths, lengths, leading_decodes(lengths), shape.group, shape.rows)

    def last_kernels(self) -> list[StepKernel]:
        return self._graphs.last_kernels()

    def stats(self) -> dict[str, float]:
        """Steps, texts, device seconds and graphs."""
        return super().stats() | self._graphs.captured()


def text_blocks(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [B, 3] rows (slot, index, block) that give each text of a step blocks of its own."""
    counts = -(-lengths // KV_BLOCK)
    slots = np.repeat(np.arange(len(lengths)), counts)
    index = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([slots, index, np.arange(len(slots))], axis=1).astype(np.int32)
