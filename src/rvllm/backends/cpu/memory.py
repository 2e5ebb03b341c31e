"""What fits in the machine's memory: weights, KV blocks, the longest sequence."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.base import KV_BLOCK, LedgerLine, Limits
from rvllm.backends.free_memory import free_bytes
from rvllm.backends.lengths import (
    GB,
    asked_blocks,
    asked_host_blocks,
    asked_length,
    encoder_lengths,
    state_rows,
)
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError
from rvllm.program.cost import kv_bytes_per_token
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import Experts, Program
from rvllm.program.ops.encoder import embedding_size

ELEMENT = 4  # float32
DEFAULT_TOKENS = 512  # of one step
ENCODER_TOKENS = 2048  # of one step of an encoder, which lets nobody wait for its next token
MAX_KV = 4 * GB  # unless a flag asks for more
COPY_RATE = 4 * GB  # bytes a second from one pool to the other, both in the machine's memory
RESERVE = 192 << 20  # for the interpreter, beside the activations of a step
SCORED = 64  # rows of logits that a step has for prompts beside those it draws from
WEIGHTS = "weights"  # the ledger's line of those in float32


@dataclass(frozen=True)
class MemoryPlan:
    """All that is taken of the machine's memory, line by line, and the limits that follow.

    The system gives memory as it is first written: a workspace or a block that nobody has used takes none.
    """

    lines: list[LedgerLine]
    limits: Limits


def rows_of_a_step(tokens: int, sequences: int) -> tuple[int, int]:
    """The most tokens and rows of logits that a step has."""
    return tokens, min(tokens, sequences + SCORED)


def workspace_bytes(program: Program, config: EngineConfig) -> int:
    """What the activations of the largest step take, where buffers share memory by their lifetimes."""
    if embedding_size(program) is None:
        tokens = config.max_num_batched_tokens or DEFAULT_TOKENS
    else:
        _, tokens = encoder_lengths(program, config, ENCODER_TOKENS)
    rows = (sum(expert_rows(op)) * op.ids.width for op in program.ops if isinstance(op, Experts))
    experts = max(rows, default=0) * tokens * ELEMENT
    return plan_workspace(program.ops, *rows_of_a_step(tokens, config.max_num_seqs)).nbytes + experts


def expert_rows(op: Experts) -> tuple[int, int]:
    """Elements a token has in one of its experts: of either product's result, and of the activation's."""
    return max(op.up.shape[1], op.out.width), op.down.shape[2]


def plan_memory(
    program: Program,
    config: EngineConfig,
    weights: list[LedgerLine],
    free: int | None = None,
) -> MemoryPlan:
    """The memory plan of a program on this machine.

    weights: the lines that they take (see `compiled.model.weight_lines`).

    Raises CapacityError when the weights, or one sequence of --max-model-len tokens, do not fit, and
    UsageError when --max-model-len exceeds what the model's positions are defined for.
    """
    free = free_bytes() if free is None else free
    workspace = workspace_bytes(program, config)
    block_bytes = KV_BLOCK * kv_bytes_per_token(program)
    host = asked_host_blocks(program, config) * block_bytes
    left = free - sum(line.nbytes for line in weights) - workspace - RESERVE - host
    if left < 0:
        raise _too_little(free, weights, workspace, left, host, block_bytes)
    a_slot = program.state_elements_per_slot * ELEMENT
    if embedding_size(program) is not None:
        limits = _encoder_limits(program, config, left, block_bytes)
    else:
        limits = _limits(program, config, left, block_bytes, a_slot)
    positions = limits.max_model_len
    lines = [
        *weights,
        LedgerLine("workspace of a step, at most", workspace),
        LedgerLine("kv cache", limits.num_blocks * block_bytes),
        LedgerLine("rope tables", sum(positions * rope.dim * ELEMENT for rope in program.ropes)),
        LedgerLine(f"states of {limits.max_num_seqs} sequences", limits.max_num_seqs * a_slot),
        LedgerLine(f"states of {limits.num_snapshots} prefixes", limits.num_snapshots * a_slot),
        LedgerLine("kv cache, second tier", host),
    ]
    return MemoryPlan([line for line in lines if line.nbytes], limits)


def _limits(program: Program, config: EngineConfig, left: int, block_bytes: int, a_slot: int) -> Limits:
    """What a program that draws tokens can hold in `left` bytes; a_slot: bytes of a sequence's states."""
    wanted = asked_length(program, config)
    sequences, snapshots = state_rows(program, config, min(left / 4, MAX_KV))
    blocks = _blocks(program, config, block_bytes, left - (sequences + snapshots) * a_slot)
    longest = blocks * KV_BLOCK
    if wanted is not None and wanted > longest:
        needed = _blocks_for(wanted)
        raise CapacityError(
            f"one sequence of --max-model-len {wanted} needs {needed} KV blocks "
            f"({needed * block_bytes / GB:.2f} GB), there are {blocks}; lower --max-model-len to {longest} "
            "or raise --kv-cache-memory-gb or --num-blocks"
        )
    limit = min(program.max_position, longest) if wanted is None else wanted
    if config.num_blocks is None and config.kv_cache_memory_gb is None:
        blocks = min(blocks, _blocks_for(limit) * sequences)  # more could never be used at once
    return Limits(
        max_num_seqs=sequences,
        max_num_batched_tokens=config.max_num_batched_tokens or DEFAULT_TOKENS,
        max_model_len=limit,
        block_size=KV_BLOCK,
        num_blocks=blocks,
        pipeline_depth=1,
        max_mixed_tokens=config.max_mixed_tokens or 0,
        num_cpu_blocks=config.num_cpu_blocks,
        block_move_seconds=block_bytes / COPY_RATE,
        block_copies=not program.states,
        prefix_reuse=not program.states,
        num_snapshots=snapshots,
    )


def _too_little(
    free: int, weights: list[LedgerLine], workspace: int, left: int, host: int, block_bytes: int
) -> CapacityError:
    """Nothing is left for a KV cache; left: bytes, below 0; host: bytes of the second tier."""
    form = "in float32" if weights[0].name == WEIGHTS else "packed for compiled kernels"
    held = f"the weights take {sum(line.nbytes for line in weights) / GB:.2f} GB {form}"
    step = f"a step {(workspace + RESERVE) / GB:.2f} GB, and only {free / GB:.2f} GB of memory are free"
    if left + host >= 0:
        return CapacityError(
            f"--num-cpu-blocks {host // block_bytes} take {host / GB:.2f} GB, {held}, {step}; lower it to "
            f"{(left + host) // block_bytes} or less"
        )
    return CapacityError(
        f"{held}, {step}; choose a smaller model (--model), a GPU (--device cuda) or a lower "
        "--max-num-batched-tokens"
    )


def _encoder_limits(program: Program, config: EngineConfig, left: int, block_bytes: int) -> Limits:
    """Texts are computed whole, and their keys and values, if any, lie in blocks of the step alone.

    left: bytes for them. Raises UsageError when the longest text finds no step, CapacityError when a step's
    keys and values do not fit.
    """
    longest, tokens = encoder_lengths(program, config, ENCODER_TOKENS)
    blocks = _blocks_for(tokens) + config.max_num_seqs if program.caches else 0
    if blocks * block_bytes > left:
        raise CapacityError(
            f"keys and values of a step of {tokens} tokens need {blocks * block_bytes / GB:.2f} GB, "
            f"and {left / GB:.2f} GB are left; lower --max-model-len or --max-num-batched-tokens"
        )
    return Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_model_len=longest,
        block_size=KV_BLOCK,
        num_blocks=blocks,
        pipeline_depth=1,
    )


def _blocks_for(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)


def _blocks(program: Program, config: EngineConfig, block_bytes: int, free: int) -> int:
    """KV blocks by --num-blocks, else --kv-cache-memory-gb, else a quarter of what is free."""
    block_bytes = max(1, block_bytes)
    asked = asked_blocks(program, config, block_bytes)
    if asked is not None:
        blocks, room = asked, config.kv_cache_memory_gb
        flag = f"--num-blocks {blocks}" if config.num_blocks is not None else f"--kv-cache-memory-gb {room:g}"
    else:
        flag, blocks = "a quarter of the free memory", int(min(free / 4, MAX_KV)) // block_bytes
    if blocks < 1:
        raise CapacityError(f"{flag} holds no KV block of {block_bytes} bytes; raise --kv-cache-memory-gb")
    if blocks * block_bytes > free:
        raise CapacityError(
            f"{flag}: the KV cache would take {blocks * block_bytes / GB:.2f} GB, "
            f"and {max(free, 0) / GB:.2f} GB are left beside the weights; "
            f"lower it to {max(free, 0) // block_bytes} blocks or less"
        )
    return blocks
