"""Sentence encoders on the GPU, planned: capacities, memory and launches; no device is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rvllm.backends.cuda.buckets import token_buckets
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, Planned, kernel_names
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.layout.allocations import (
    WORKSPACE,
    Allocation,
    DeviceMemory,
    lines_of,
    nowhere,
    weight_allocations,
)
from rvllm.backends.cuda.layout.fusion import Stage, fuse
from rvllm.backends.cuda.layout.memory import Budget, beside_buffers
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.layout.weights import packed_weights
from rvllm.backends.cuda.lowering import lower
from rvllm.backends.cuda.ops.encoder.plan import text_rows
from rvllm.backends.cuda.ops.family import Lowering
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.step_planner import distinct
from rvllm.backends.heads import without_head
from rvllm.backends.lengths import GB, encoder_lengths
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import Program

TOKENS = 16384  # of the largest step, unless asked otherwise
MIN_WORKSPACE = 48 << 20  # weights pass through the workspace when they are loaded


@dataclass(frozen=True)
class EncoderPlan(DeviceMemory):
    """Capacities, stages and sizes of an encoder on one GPU; planning touches no device.

    seqs: texts of the largest step; longest: tokens of the longest text; rows: queries of attention's blocks.
    """

    program: Program
    chip: DeviceInfo
    stages: list[Stage]
    wanted: list[PackedWeight]
    layout: Layout
    addresses: Addresses  # of nothing, until memory is taken
    tokens: int
    seqs: int
    longest: int
    rows: int
    strategy: GemmStrategy

    @staticmethod
    def make(
        program: Program,
        config: EngineConfig,
        facts: DeviceFacts,
        budget: Budget,
        strategy: GemmStrategy | None = None,
    ) -> EncoderPlan:
        """Raises UsageError when the longest text finds no step, CapacityError when memory is short.

        strategy: see `StepPlanner.plan`.
        """
        program = without_head(program)
        longest, tokens = encoder_lengths(program, config, TOKENS)
        seqs = config.max_num_seqs
        strategy = strategy or GemmStrategy(config.gemm_strategy)
        stages = fuse(program, gated_epilogue=strategy.fuses_gates)
        wanted = packed_weights(stages, strategy.layout)
        workspace = plan_workspace(stages, tokens, seqs)
        chip = facts.info
        rows = text_rows(program, chip)
        layout = Layout(tokens, seqs, samples=0, tiles=tokens // rows + seqs, updates=0)
        allocations = [
            *weight_allocations(wanted),
            Allocation(WORKSPACE, "workspace", max(workspace.nbytes, MIN_WORKSPACE)),
            Allocation("metadata", "metadata", layout.nbytes, zeroed=True),
            *beside_buffers(program, strategy, tokens, seqs, facts.capability),
        ]
        lines = lines_of(allocations)
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
            chip=chip,
            stages=stages,
            wanted=wanted,
            workspace=workspace,
            layout=layout,
            allocations=allocations,
            addresses=nowhere(allocations, workspace),
            tokens=tokens,
            seqs=seqs,
            longest=longest,
            rows=rows,
            strategy=strategy,
        )

    def sizes(self) -> list[int]:
        """Padded token counts, one graph each."""
        return token_buckets(self.tokens)

    def counts(self, tokens: int) -> Counts:
        """What a step of up to `tokens` tokens can hold."""
        texts = min(tokens, self.seqs)
        return Counts(tokens, texts, texts)

    def layout_of(self, tokens: int) -> Layout:
        """The metadata of such a step."""
        return replace(self.layout, tiles=tokens // self.rows + self.counts(tokens).seqs)

    def launches(self, tokens: int) -> list[Planned]:
        """A step of up to `tokens` tokens. Raises MissingKernelError for ops without a kernel."""
        counts = self.counts(tokens)
        shape = Shape(self.tokens, self.seqs, self.seqs, self.program.vocab_size, 0, 0, 0, 0, 0)
        layout = self.layout_of(tokens)
        lowering = Lowering(
            self.program.dtype, self.chip, shape, self.addresses, layout, counts, {}, None, self.strategy
        )
        return lower(lowering, self.stages)

    def kernels(self) -> list[str]:
        """Every kernel any step can need."""
        few = replace(self, stages=distinct(self.stages))
        names = [name for size in self.sizes() for name in kernel_names(few.launches(size))]
        return list(dict.fromkeys(names))
