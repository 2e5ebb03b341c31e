"""What a start would take of the GPU, without loading anything: for `rvllm info`."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.layout.memory import BLOCK, HEADROOM, Budget
from rvllm.backends.cuda.loaded_model import OpenDevice
from rvllm.backends.cuda.ops.encoder.plan import EncoderPlan
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size
from rvllm.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class MemoryPreview:
    """lines: bytes by name, of all the device's memory; their sum is `total`. limits: what would fit."""

    total: int
    lines: dict[str, int]
    limits: dict[str, int]


def preview_here(program: Program, checkpoint: Checkpoint | None, config: EngineConfig) -> MemoryPreview:
    """The preview on this machine's GPU as it is now. Raises what the start would raise."""
    found = OpenDevice.for_program(program, config)
    try:
        program = kept(program, checkpoint, config, found.facts)
        return preview(program, config, found.facts, found.budget)
    finally:
        found.device.close()


def preview(program: Program, config: EngineConfig, facts: DeviceFacts, budget: Budget) -> MemoryPreview:
    """The lines and limits of the plan that a start with this budget follows."""
    if embedding_size(program) is None:
        memory = StepPlanner.plan(program, config, facts, budget)[0].memory
        taken = memory.lines
        limits = {
            "kv blocks": memory.num_blocks,
            "tokens they hold": memory.num_blocks * BLOCK,
            "max_model_len": memory.max_model_len,
            "max_num_seqs": memory.seqs,
            "max_num_batched_tokens": memory.tokens,
        }
    else:
        plan = EncoderPlan.make(program, config, facts, budget)
        taken = plan.lines
        limits = {
            "max_model_len": plan.longest,
            "max_num_seqs": plan.seqs,
            "max_num_batched_tokens": plan.tokens,
        }
    rest = budget.total - budget.used - sum(taken.values()) - HEADROOM
    lines = {
        "in use before (driver, context, others)": budget.used,
        **taken,
        "kept for kernels and graphs": HEADROOM,
        "free": rest,
    }
    return MemoryPreview(budget.total, lines, limits)
