"""What a start would take of the GPU, without loading anything: for `rvllm info`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cuda.device.driver import Device, DeviceFacts
from rvllm.backends.cuda.encoder_plan import EncoderPlan
from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.layout.memory import HEADROOM, Budget
from rvllm.backends.cuda.loaded_model import OpenDevice
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.pooler import plan_pooler
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.backends.cuda.supported import check_device, check_supported
from rvllm.backends.cuda.tuning.start import known_strategy
from rvllm.config import EngineConfig
from rvllm.program.cost import StepShape
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size
from rvllm.weights.checkpoint import Checkpoint

BOUNDLESS = Budget(1 << 60, 0, 1 << 59)  # where memory is not what is asked about


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
        strategy = known_strategy(program, config, found.facts)
        return preview(program, config, found.facts, found.budget, strategy)
    finally:
        found.device.close()


def preview(
    program: Program,
    config: EngineConfig,
    facts: DeviceFacts,
    budget: Budget,
    strategy: GemmStrategy | None = None,
) -> MemoryPreview:
    """The lines and limits of the plan that a start with this budget follows."""
    if embedding_size(program) is None or program.caches:
        plan_of = StepPlanner.plan if embedding_size(program) is None else plan_pooler
        memory = plan_of(program, config, facts, budget, strategy)[0].memory
        taken = memory.lines
        limits = {
            "kv blocks": memory.shape.kv_blocks,
            "tokens they hold": memory.shape.kv_blocks * KV_BLOCK,
            "max_model_len": memory.max_model_len,
            "max_num_seqs": memory.shape.seqs,
            "max_num_batched_tokens": memory.shape.tokens,
        }
    else:
        plan = EncoderPlan.make(program, config, facts, budget, strategy)
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


def kernels_here(
    program: Program, checkpoint: Checkpoint | None, config: EngineConfig, shape: StepShape
) -> tuple[Program, dict[str, str]]:
    """The program as this machine's GPU keeps it, and the kernels of each op in such a step."""
    device = Device()
    try:
        facts = device.facts()
        check_device(facts)
        strategy = known_strategy(kept(program, checkpoint, config, facts), config, facts)
    finally:
        device.close()
    return kernels_on(program, checkpoint, config, facts, shape, strategy)


def kernels_on(
    program: Program,
    checkpoint: Checkpoint | None,
    config: EngineConfig,
    facts: DeviceFacts,
    shape: StepShape,
    strategy: GemmStrategy | None = None,
) -> tuple[Program, dict[str, str]]:
    """See `kernels_here`. Memory is no bound: the plan is for one step, not for a start."""
    check_supported(program, config)
    program = kept(program, checkpoint, config, facts)
    tokens = max(shape.tokens, shape.sequences)
    if embedding_size(program) is not None and program.caches:
        asked = replace(config, max_num_seqs=shape.sequences, max_num_batched_tokens=tokens)
        asked = replace(asked, max_model_len=shape.query_len)
        launches = plan_pooler(program, asked, facts, BOUNDLESS, strategy)[0].body(tokens)
    elif embedding_size(program) is not None:
        stepped = replace(config, max_num_batched_tokens=tokens)
        plan = EncoderPlan.make(program, stepped, facts, BOUNDLESS, strategy)
        launches = plan.launches(tokens)
    else:
        config = replace(
            config, max_num_seqs=shape.sequences, max_num_batched_tokens=tokens, num_blocks=1 << 16
        )
        planner, _ = StepPlanner.plan(program, config, facts, BOUNDLESS, strategy)
        decode = shape.query_len == 1
        launches = planner.decode(tokens) if decode else [*planner.body(tokens), *planner.head(shape.samples)]
    found: dict[str, str] = {}
    for launch in launches:
        for name in launch.op.split(" + "):
            found[name] = f"{found[name]}, {launch.kernel}" if name in found else launch.kernel
    return program, found
