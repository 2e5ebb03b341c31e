"""Every byte of device memory, planned before any of it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rvllm.backends.base import MAX_BIASES, MAX_STOPS
from rvllm.backends.cuda.device.arena import ALIGNMENT
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.weights import ELEMENT, PackedWeight
from rvllm.backends.cuda.lowering import scratch_of
from rvllm.backends.cuda.ops.attention.paged import decode_plans
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, table_stride
from rvllm.backends.cuda.ops.family import TileShape
from rvllm.backends.cuda.ops.gemm.cublas import WORKSPACE
from rvllm.backends.cuda.ops.sampling.slots import MAX_TOP, START_WORDS, StateSizes
from rvllm.backends.lengths import asked_length
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import LatentRopeKV, Program, RopeKV
from rvllm.program.rope import Rope

GB = 1_000_000_000
BLOCK = 16  # positions of a KV block
SCORED_ROWS = 64  # rows of a step that may be scored for prompt logprobs besides the sampled ones
DEFAULT_TOKENS = 8192
MIN_START_WORDS = 1 << 18
HEADROOM = 256 << 20  # for what the driver takes by itself: kernels, graphs, their launch buffers


@dataclass(frozen=True)
class Budget:
    """Bytes of device memory there are, in use before us, and ours to carve up, which HEADROOM is not."""

    total: int
    used: int
    ours: int


def budget_of(config: EngineConfig, free: int, total: int) -> Budget:
    """What --gpu-memory-utilization and --gpu-memory-reserve-gb leave: both limits hold.

    Utilization is a share of the whole card, other processes' memory included; the reserve stays free. What
    the driver takes for kernels and graphs comes out of HEADROOM, so that both limits hold for all of it.
    """
    used = total - free
    share = int(total * config.gpu_memory_utilization) - used
    room = min(share, free - int(config.gpu_memory_reserve_gb * GB))
    return Budget(total, used, max(0, room - HEADROOM))


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in bytes of everything on the device, and the capacities they were computed for."""

    lines: dict[str, int]
    budget: Budget
    tokens: int  # rows of the largest step
    samples: int  # rows of logits
    seqs: int
    max_model_len: int
    longest: int  # tokens of a sequence that buffers are laid out for
    table_stride: int
    num_blocks: int
    block_bytes: int
    layout: Layout
    start_words: int
    decode: dict[str, DecodePlan]
    scratch: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return sum(self.lines.values())


def plan_memory(
    program: Program,
    stages: list[Stage],
    config: EngineConfig,
    facts: DeviceFacts,
    budget: Budget,
    tiles: TileShape | None,
    wanted: Sequence[PackedWeight],
) -> MemoryPlan:
    """Lays out the budget; the KV cache gets what the rest leaves.

    tiles: of the step's tile list, None for programs without. wanted: the weights in their forms. Raises
    CapacityError with the shortfall and the flags that would fit, UsageError for a --max-model-len beyond
    the model's positions.
    """
    wanted_len = asked_length(program, config)
    longest = wanted_len or program.max_position
    weights = sum(_aligned(w.nbytes) for w in wanted)
    seqs = _sequences(program, config, budget.ours - weights)
    tokens = max(config.max_num_batched_tokens or DEFAULT_TOKENS, seqs)
    samples = seqs + SCORED_ROWS
    stride = table_stride(longest)
    block_bytes = max(1, program.kv_elements_per_token * ELEMENT * BLOCK)
    layout = Layout(
        tokens=tokens,
        seqs=seqs,
        samples=samples,
        tiles=-(-tokens * tiles.group // tiles.rows) + seqs if tiles else 0,
        updates=min(seqs * stride, 1 << 16),
    )
    start_words = max(MIN_START_WORDS, seqs * START_WORDS + longest + 2 * MAX_BIASES + MAX_STOPS)
    mask_words = -(-program.vocab_size // 32)
    sizes, vocab = StateSizes(seqs, program.vocab_size), -(-program.vocab_size // 4) * 4

    workspace = plan_workspace([s for s in stages if s.reads or s.writes], tokens, samples).nbytes
    logits = 4 * samples * vocab
    lines = {
        "weights": weights,
        "workspace": _aligned(workspace),
        "logits": 2 * _aligned(logits),
        "rope tables": sum(2 * _aligned(4 * stride * BLOCK * (rope.dim // 2)) for rope in ropes_of(program)),
        "sampler": sum(
            _aligned(n)
            for n in (
                sizes.parameters, sizes.histories, sizes.biases, sizes.biases, sizes.stops,
                8 * sizes.chunks() * samples, 4 * samples, 4 * seqs, 4 * samples * mask_words,
                samples * (16 + 4 + 4 + 8 * MAX_TOP),
            )
        ),
        "block tables and metadata": sum(
            _aligned(n) for n in (4 * seqs * stride, layout.nbytes, 4 * start_words)
        ),
    }  # fmt: skip

    scratch = scratch_of(program, tokens, seqs, facts.capability)
    if scratch:
        lines["scratch of ops"] = sum(_aligned(n) for n in scratch.values())
    if program.states:
        lines[state_line(seqs)] = sum(_aligned(4 * s.elements * seqs) for s in program.states)
    if config.gemm_strategy == "cublas":
        lines["cuBLAS workspace"] = WORKSPACE

    most_blocks = max(1, (budget.ours - sum(lines.values())) // block_bytes)
    asked = config.num_gpu_blocks or config.num_blocks
    if asked is None and config.kv_cache_memory_gb is not None:
        asked = max(1, int(config.kv_cache_memory_gb * GB) // block_bytes)
    blocks = asked or most_blocks
    chip = DeviceInfo(facts.capability, facts.sm_count, facts.smem_per_block)
    decode = decode_plans(program.ops, program.dtype, chip, seqs, longest, blocks)
    partial = max((p.partial_bytes for p in decode.values()), default=0)
    arrivals = max((p.arrivals_bytes for p in decode.values()), default=0)
    lines["attention workspace"] = _aligned(partial) + _aligned(arrivals)
    # Each layer's two caches are aligned on their own.
    slack = 2 * ALIGNMENT * len(program.caches)
    if asked is None:
        blocks = (budget.ours - sum(lines.values()) - slack) // block_bytes
    lines["kv cache"] = max(blocks, 0) * block_bytes + slack
    _check_fit(lines, budget, blocks, block_bytes, wanted_len)
    return MemoryPlan(
        lines=lines,
        budget=budget,
        tokens=tokens,
        samples=samples,
        seqs=seqs,
        max_model_len=min(longest, blocks * BLOCK),
        longest=longest,
        table_stride=stride,
        num_blocks=blocks,
        block_bytes=block_bytes,
        layout=layout,
        start_words=start_words,
        decode=decode,
        scratch=scratch,
    )


def ropes_of(program: Program) -> list[Rope]:
    """The rotary tables the program's ops read, each once."""
    found = (op.rope for op in program.ops if isinstance(op, RopeKV | LatentRopeKV))
    return list(dict.fromkeys(rope for rope in found if rope is not None))


def state_line(seqs: int) -> str:
    """The ledger's line for the states of recurrent layers."""
    return f"recurrent state of {seqs} sequences"


def _sequences(program: Program, config: EngineConfig, free: int) -> int:
    """How many sequences run at once: --max-num-seqs, or as many as half of the free memory has states for.

    free: bytes beside the weights. The KV cache has the other half, or both have --kv-cache-memory-gb. Raises
    CapacityError where not one state fits.
    """
    each = 4 * program.state_elements_per_slot
    if not each:
        return config.max_num_seqs
    flag = config.kv_cache_memory_gb
    room = free // 2 if flag is None else int(flag * GB)
    if room < each:
        raise CapacityError(
            f"GPU memory: the recurrent layers' state of one sequence takes {each / GB:.3f} GB, and "
            f"{max(room, 0) / GB:.3f} GB are for states beside the weights; raise --gpu-memory-utilization "
            "or --kv-cache-memory-gb"
        )
    return min(config.max_num_seqs, room // each)


def _check_fit(
    lines: dict[str, int], budget: Budget, blocks: int, block_bytes: int, wanted: int | None
) -> None:
    fixed = sum(lines.values()) - lines["kv cache"]
    needed = fixed + max(blocks, -(-(wanted or BLOCK) // BLOCK)) * block_bytes
    if needed > budget.ours or blocks < 1:
        parts = ", ".join(f"{name} {nbytes / GB:.2f}" for name, nbytes in lines.items() if name != "kv cache")
        raise CapacityError(
            f"GPU memory: {needed / GB:.2f} GB are needed ({parts}, KV cache at least "
            f"{(needed - fixed) / GB:.2f}), of {budget.total / GB:.2f} GB {budget.ours / GB:.2f} GB are ours "
            f"({budget.used / GB:.2f} GB were in use before), short by {(needed - budget.ours) / GB:.2f} GB; "
            "raise --gpu-memory-utilization, or lower --max-model-len, --max-num-seqs, "
            "--max-num-batched-tokens or --num-gpu-blocks"
        )
    if wanted is not None and blocks * BLOCK < wanted:
        raise CapacityError(
            f"one sequence of --max-model-len {wanted} needs {-(-wanted // BLOCK)} KV blocks and there are "
            f"{blocks}; lower --max-model-len to {blocks * BLOCK}, or raise --num-gpu-blocks or "
            "--gpu-memory-utilization"
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
