"""Every byte of device memory, planned before any of it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rvllm.backends.base import KV_BLOCK, MAX_BIASES, MAX_STOPS
from rvllm.backends.cuda.device.arena import ALIGNMENT
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.layout.addresses import Shape
from rvllm.backends.cuda.layout.allocations import (
    WEIGHTS,
    WORKSPACE,
    Allocation,
    DeviceMemory,
    lines_of,
    weight_allocations,
)
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.packed import ELEMENT, PackedWeight
from rvllm.backends.cuda.lowering import scratch_of
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, table_stride
from rvllm.backends.cuda.ops.family import TileShape
from rvllm.backends.cuda.ops.gemm.cublas import WORKSPACE as WORKSPACE_BYTES
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.ops.sampling.arrays import allocations as sampler_allocations
from rvllm.backends.cuda.ops.sampling.arrays import logits_allocations
from rvllm.backends.cuda.ops.sampling.slots import START_WORDS, StateSizes
from rvllm.backends.cuda.paged import allocations as attention_allocations
from rvllm.backends.cuda.paged import decode_plans
from rvllm.backends.lengths import GB, asked_blocks, asked_length, state_rows
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError
from rvllm.program.cost import kv_bytes_per_token
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import Program, Sample

SCORED_ROWS = 64  # rows of a step that may be scored for prompt logprobs besides the sampled ones
DEFAULT_TOKENS = 8192
MIN_START_WORDS = 1 << 18
KV_CACHE, TABLES = "kv cache", "block tables and metadata"  # lines of the ledger
HEADROOM = 256 << 20  # for what the driver takes by itself: kernels, graphs, their launch buffers


@dataclass(frozen=True)
class Budget:
    """Bytes of device memory there are, in use before us, and ours to carve up, which HEADROOM is not."""

    total: int
    used: int
    ours: int


def budget_of(config: EngineConfig, free: int, total: int) -> Budget:
    """What --gpu-memory-utilization and --gpu-memory-reserve-gb leave: both limits hold.

    Utilization is a share of the whole card, other processes' memory included (--gpu-memory-share: without);
    the reserve stays free. What the driver takes for kernels and graphs comes out of HEADROOM, so that both
    limits hold for all of it.
    """
    used = total - free
    if config.gpu_memory_share is not None:
        share = int(total * config.gpu_memory_share)
    else:
        share = int(total * config.gpu_memory_utilization) - used
    room = min(share, free - int(config.gpu_memory_reserve_gb * GB))
    return Budget(total, used, max(0, room - HEADROOM))


@dataclass(frozen=True)
class MemoryPlan(DeviceMemory):
    """Everything that is taken of the device's memory, and the capacities it was computed for.

    longest: tokens of a sequence that buffers are laid out for; max_model_len: those that the KV cache has
    room for too. start_words: int32 words of slot starts. snapshots: of recurrent states, behind those of
    sequences.
    """

    shape: Shape
    max_model_len: int
    longest: int
    block_bytes: int
    layout: Layout
    start_words: int
    decode: dict[str, DecodePlan]
    snapshots: int = 0


def plan_memory(
    program: Program,
    stages: list[Stage],
    config: EngineConfig,
    facts: DeviceFacts,
    budget: Budget,
    tiles: TileShape | None,
    wanted: Sequence[PackedWeight],
    strategy: GemmStrategy,
) -> MemoryPlan:
    """Lays out the budget; the KV cache gets what the rest leaves.

    tiles: of the step's tile list, None for programs without. wanted: the weights in their forms. Raises
    CapacityError with the shortfall and the flags that would fit, UsageError for a --max-model-len beyond
    the model's positions.
    """
    weights = weight_allocations(wanted)
    longest = asked_length(program, config) or program.max_position
    seqs, snapshots = state_rows(program, config, (budget.ours - _taken(weights)) // 2)
    shape = _shape(program, config, seqs, longest)
    layout = _layout(shape, tiles)
    start_words = max(MIN_START_WORDS, seqs * START_WORDS + longest + 2 * MAX_BIASES + MAX_STOPS)
    workspace = plan_workspace(stages, shape.tokens, shape.samples)
    fixed = [
        *weights,
        Allocation(WORKSPACE, "workspace", workspace.nbytes),
        *logits_allocations(shape),
        *_ropes(program, shape),
        *sampler_allocations(shape),
        Allocation("tables", TABLES, 4 * seqs * shape.table_stride, zeroed=True),
        Allocation("metadata", TABLES, layout.nbytes, zeroed=True),
        Allocation("starts", TABLES, 4 * start_words),
    ]
    after = [
        *beside_buffers(program, strategy, shape.tokens, seqs, facts.capability),
        *_states(program, seqs, snapshots),
    ]
    block_bytes = max(1, kv_bytes_per_token(program) * KV_BLOCK)
    room = budget.ours - _taken(fixed) - _taken(after)
    asked = asked_blocks(program, config, block_bytes)
    if asked is not None and config.num_blocks is None:
        asked = max(1, asked)
    most = asked or max(1, room // block_bytes)
    given = (program.ops, program.dtype, facts.info, seqs, longest, most)
    decode = decode_plans(*given)
    rotating = decode_plans(*given, decode)  # of a few sequences, where a kernel rotates too
    attention = attention_allocations([*decode.values(), *rotating.values()])
    slack = 2 * ALIGNMENT * len(program.caches)  # each is aligned on its own
    blocks = asked or (room - _taken(attention) - slack) // block_bytes
    allocations = [*fixed, *attention, *after]
    _check_fit(lines_of(allocations), config, budget, blocks, block_bytes)
    return MemoryPlan(
        allocations=[*allocations, *_caches(program, blocks)],
        workspace=workspace,
        shape=replace(shape, kv_blocks=blocks),
        snapshots=snapshots,
        max_model_len=min(longest, blocks * KV_BLOCK),
        longest=longest,
        block_bytes=block_bytes,
        layout=layout,
        start_words=start_words,
        decode=decode,
    )


def _taken(allocations: Iterable[Allocation]) -> int:
    return sum(lines_of(allocations).values())


def _shape(program: Program, config: EngineConfig, seqs: int, longest: int) -> Shape:
    """Capacities and strides; KV blocks are counted later.

    The vocabulary is what tokens are drawn from: programs that pool texts have no logits and no sampler.
    """
    vocab = program.vocab_size if any(isinstance(op, Sample) for op in program.ops) else 0
    return Shape(
        tokens=max(config.max_num_batched_tokens or DEFAULT_TOKENS, seqs),
        samples=seqs + SCORED_ROWS,
        seqs=seqs,
        vocab=vocab,
        logits_stride=-(-vocab // 4) * 4,
        table_stride=table_stride(longest),
        history_stride=StateSizes(seqs, vocab).history_stride,
        mask_words=-(-vocab // 32),
        kv_blocks=0,
    )


def _layout(shape: Shape, tiles: TileShape | None) -> Layout:
    return Layout(
        tokens=shape.tokens,
        seqs=shape.seqs,
        samples=shape.samples,
        tiles=-(-shape.tokens * tiles.group // tiles.rows) + shape.seqs if tiles else 0,
        updates=min(shape.seqs * shape.table_stride, 1 << 16),
    )


def beside_buffers(
    program: Program, strategy: GemmStrategy, tokens: int, seqs: int, capability: int
) -> list[Allocation]:
    """What kernels need beside the program's buffers, for steps of so many tokens and sequences."""
    library = []
    if strategy.uses_cublas:
        library = [Allocation("gemm_workspace", "cuBLAS workspace", WORKSPACE_BYTES)]
    scratch = scratch_of(program, tokens, seqs, capability)
    return library + [Allocation("scratch", "scratch of ops", n, name, True) for name, n in scratch.items()]


def _ropes(program: Program, shape: Shape) -> list[Allocation]:
    """Cosines, then sines, of every rotation: float32 [positions, dim / 2]."""
    positions = shape.table_stride * KV_BLOCK
    return [
        Allocation("ropes", "rope tables", 4 * positions * (rope.dim // 2), rope)
        for rope in program.ropes
        for _ in ("cos", "sin")
    ]


def _states(program: Program, seqs: int, snapshots: int) -> list[Allocation]:
    """float32 [seqs + snapshots, elements] of every recurrent layer."""
    line = state_line(seqs, snapshots)
    return [Allocation("states", line, 4 * s.elements * (seqs + snapshots), s.name) for s in program.states]


def _caches(program: Program, blocks: int) -> list[Allocation]:
    """Keys, then values, of every layer that attends."""
    return [
        Allocation(
            "caches", KV_CACHE, blocks * KV_BLOCK * cache.heads * cache.row_bytes(dim, ELEMENT), cache.name
        )
        for cache in program.caches
        for dim in (cache.key_dim, cache.value_dim)
    ]


def state_line(seqs: int, snapshots: int) -> str:
    """The ledger's line for the states of recurrent layers."""
    return f"recurrent state of {seqs} sequences" + (f" and {snapshots} prefixes" if snapshots else "")


def _check_fit(
    lines: dict[str, int], config: EngineConfig, budget: Budget, blocks: int, block_bytes: int
) -> None:
    """Raises CapacityError where `lines` and the KV cache exceed the budget, or the cache is too small."""
    wanted = config.max_model_len
    fixed = sum(lines.values())
    needed = fixed + max(blocks, -(-(wanted or KV_BLOCK) // KV_BLOCK)) * block_bytes
    if needed > budget.ours or blocks < 1:
        parts = ", ".join(f"{name} {nbytes / GB:.2f}" for name, nbytes in lines.items())
        turns = _turns(config, budget, needed, fixed, lines[WEIGHTS], block_bytes)
        raise CapacityError(
            f"GPU memory: {needed / GB:.2f} GB are needed ({parts}, KV cache at least "
            f"{(needed - fixed) / GB:.2f}), of {budget.total / GB:.2f} GB {budget.ours / GB:.2f} GB are ours "
            f"({budget.used / GB:.2f} GB were in use before), short by {(needed - budget.ours) / GB:.2f} GB; "
            f"{', or '.join(turns)}"
        )
    if wanted is not None and blocks * KV_BLOCK < wanted:
        raise CapacityError(
            f"one sequence of --max-model-len {wanted} needs {-(-wanted // KV_BLOCK)} KV blocks and there "
            f"are {blocks}; lower --max-model-len to {blocks * KV_BLOCK}, or raise --num-blocks or "
            "--gpu-memory-utilization"
        )


def _turns(
    config: EngineConfig, budget: Budget, needed: int, fixed: int, weights: int, block_bytes: int
) -> list[str]:
    """The flags, with values, that would make room for `needed` bytes; `fixed` of them are not KV cache."""
    most = (budget.ours - fixed) // block_bytes
    found: list[str] = []
    free = budget.total - budget.used
    own = config.gpu_memory_share
    flag, others = ("--gpu-memory-share", 0) if own else ("--gpu-memory-utilization", budget.used)
    share = math.ceil((others + needed + HEADROOM) / budget.total * 100) / 100
    reserve = math.floor((free - needed - HEADROOM) / GB * 10) / 10
    if reserve >= 0 and share <= 1:
        if share > (own or config.gpu_memory_utilization):
            found.append(f"raise {flag} to {share:.2f}")
        if reserve < config.gpu_memory_reserve_gb:
            lowered = f"--gpu-memory-reserve-gb to {reserve:g}"
            found = [f"{found[0]} and lower {lowered}" if found else f"lower {lowered}"]
    if weights > free - HEADROOM:
        found.append("quantise the weights, which alone are more than is free (--quantization fp8 or int4)")
    elif config.num_blocks is not None and most > 0:
        found.append(f"lower --num-blocks to {most}")
    elif config.kv_cache_memory_gb is not None and most > 0:
        found.append(f"lower --kv-cache-memory-gb to {math.floor(most * block_bytes / GB * 100) / 100:g}")
    else:
        found.append("lower --max-model-len, --max-num-seqs or --max-num-batched-tokens")
    return found
