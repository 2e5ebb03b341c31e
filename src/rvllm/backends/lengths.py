"""How long a text may be and what a step must hold, as far as no device has a say in it."""

from __future__ import annotations

from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, UsageError
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size

GB = 1_000_000_000
STATE_ELEMENT = 4  # bytes of a number of a recurrent state
MAX_SNAPSHOTS = 64  # of recurrent states, unless a flag asks for more


def asked_length(program: Program, config: EngineConfig) -> int | None:
    """--max-model-len in tokens, None where it is not given.

    Raises UsageError when it exceeds what the model's positions are defined for.
    """
    wanted = config.max_model_len
    if wanted is not None and wanted > program.max_position:
        raise UsageError(
            f"--max-model-len {wanted} is more than the model's {program.max_position} positions"
        )
    return wanted


def asked_host_blocks(program: Program, config: EngineConfig) -> int:
    """--num-cpu-blocks. Raises UsageError where nothing could ever be found again in host memory."""
    if config.num_cpu_blocks and not config.enable_prefix_caching:
        raise UsageError(
            f"--num-cpu-blocks {config.num_cpu_blocks}: what moves to host memory is found by the prefix "
            "cache; leave --no-enable-prefix-caching away"
        )
    if config.num_cpu_blocks and (
        program.states or not program.caches or embedding_size(program) is not None
    ):
        raise UsageError(
            f"--num-cpu-blocks {config.num_cpu_blocks}: {program.architecture} keeps no "
            "prefixes that could be found there; leave the flag away"
        )
    return config.num_cpu_blocks


def asked_blocks(program: Program, config: EngineConfig, block_bytes: int) -> int | None:
    """KV blocks that --num-blocks or --kv-cache-memory-gb ask for, None where neither is given.

    Raises UsageError where both are, unless the second bounds recurrent states, too.
    """
    blocks, room = config.num_blocks, config.kv_cache_memory_gb
    held = None if room is None else int(room * GB) // max(1, block_bytes)
    if blocks is not None and room is not None and not program.states:
        raise UsageError(
            f"--num-blocks {blocks} takes {blocks * block_bytes / GB:.2f} GB for the KV cache, and "
            f"--kv-cache-memory-gb {room:g} holds {held} blocks: give one of them"
        )
    return held if blocks is None else blocks


def state_rows(program: Program, config: EngineConfig, usual: float) -> tuple[int, int]:
    """What states of recurrent layers there is room for: (sequences at once, snapshots of prefixes).

    usual: bytes for them without --kv-cache-memory-gb, which bounds states and KV cache each. Without
    --num-state-snapshots a fifth of them are snapshots, at most MAX_SNAPSHOTS, and what sequences leave.
    Raises CapacityError where there is no room for a sequence.
    """
    each = STATE_ELEMENT * program.state_elements_per_slot
    if not each:
        return config.max_num_seqs, 0
    flag = config.kv_cache_memory_gb
    room = int(usual if flag is None else flag * GB)
    if room < each:
        raise CapacityError(
            f"the recurrent layers' state of one sequence takes {each / GB:.3f} GB, and "
            f"{max(room, 0) / GB:.3f} GB are for states; raise --kv-cache-memory-gb or free memory "
            "(on a GPU: --gpu-memory-utilization)"
        )
    rows = room // each
    asked = config.num_state_snapshots if config.enable_prefix_caching else 0
    if asked is None:
        sequences = min(config.max_num_seqs, rows - rows // 5)
        return sequences, min(MAX_SNAPSHOTS, rows - sequences)
    if rows <= asked:
        raise CapacityError(
            f"--num-state-snapshots {asked}: there is memory for {rows} states of recurrent layers; lower it "
            f"to {max(0, rows - 1)} or less, or raise --kv-cache-memory-gb"
        )
    return min(config.max_num_seqs, rows - asked), asked


def encoder_lengths(program: Program, config: EngineConfig, usual: int) -> tuple[int, int]:
    """(tokens of the longest text, tokens of the largest step) of an encoder, which takes texts whole.

    usual: of a step, unless --max-num-batched-tokens says otherwise or a text is longer. Raises UsageError
    where the longest text finds no step.
    """
    longest = asked_length(program, config) or program.max_position
    tokens = config.max_num_batched_tokens or max(usual, longest)
    if tokens < longest:
        raise UsageError(
            f"--max-num-batched-tokens {tokens}: a step must hold the longest text whole, {longest} tokens; "
            "raise it or lower --max-model-len"
        )
    return longest, tokens
