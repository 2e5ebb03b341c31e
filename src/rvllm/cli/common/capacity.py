"""What a model would take of a GPU that need not be here, and how many sequences of which length fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rvllm.backends.cuda.device.driver import DeviceFacts
    from rvllm.config import EngineConfig
    from rvllm.program.ops.dense import Program
    from rvllm.weights.checkpoint import Checkpoint

LENGTHS = (1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10)


def capacity(
    program: Program, checkpoint: Checkpoint | None, config: EngineConfig, facts: DeviceFacts
) -> dict[str, Any]:
    """Bytes by name, of the GPU and of its host, limits, and how many sequences of each length fit at once.

    Nothing else is taken to run on the GPU. Raises CapacityError, with what to turn, when a model does not
    fit.
    """
    from rvllm.backends.base import KV_BLOCK
    from rvllm.backends.cuda.formats.choose import kept
    from rvllm.backends.cuda.known_gpus import CONTEXT_BYTES
    from rvllm.backends.cuda.layout.memory import budget_of
    from rvllm.backends.cuda.layout.preview import preview
    from rvllm.backends.cuda.supported import check_device, check_supported
    from rvllm.program.cost import kv_bytes_per_token

    check_supported(program, config)
    check_device(facts)
    budget = budget_of(config, facts.memory - CONTEXT_BYTES, facts.memory)
    seen = preview(kept(program, checkpoint, config, facts), config, facts, budget)
    tokens, longest = seen.limits.get("tokens they hold"), seen.limits["max_model_len"]
    fits = (
        {n: min(tokens // n, seen.limits["max_num_seqs"]) for n in LENGTHS if n <= longest} if tokens else {}
    )
    host = config.num_cpu_blocks * kv_bytes_per_token(program) * KV_BLOCK
    return {
        "gpu": facts.name,
        "bytes": seen.total,
        "lines": seen.lines,
        "host_lines": {"kv cache, pinned": host} if host else {},
        "limits": seen.limits,
        "sequences": fits,
    }


def capacity_text(found: dict[str, Any], per_token: int) -> str:
    """The same as tables. per_token: bytes of KV cache."""
    from rvllm.cli.common.tables import facts, human_bytes

    rows = [(name, human_bytes(nbytes)) for name, nbytes in found["lines"].items()]
    limits = [("KV cache per token", human_bytes(per_token))]
    limits += [(name, f"{value:,}") for name, value in found["limits"].items()]
    parts = [facts(f"memory of {found['gpu']}, {human_bytes(found['bytes'])}", rows)]
    if found["host_lines"]:
        parts.append(facts("host memory", [(n, human_bytes(b)) for n, b in found["host_lines"].items()]))
    parts.append(facts("limits", limits))
    if found["sequences"]:
        fits = [(f"{length:,} tokens", f"{count:,}") for length, count in found["sequences"].items()]
        parts.append(facts("sequences at once, each of", fits))
    return "\n\n".join(parts)
