"""The program as one GPU runs it: products joined, and every matrix in the format it is kept in."""

from __future__ import annotations

import logging

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.joining import joined
from rvllm.config import EngineConfig
from rvllm.errors import MissingKernelError, UsageError
from rvllm.program.formats import BlocksFormat
from rvllm.program.ops.dense import Program
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.formats import expanded, with_formats


def kept(
    program: Program, checkpoint: Checkpoint | None, config: EngineConfig, facts: DeviceFacts
) -> Program:
    """The program to plan and load; checkpoint: None for dummy weights.

    Raises UsageError or MissingKernelError for formats that are asked for and cannot be run.
    """
    found = with_formats(joined(program), checkpoint, config.gpu_quantization)
    plain = (type(None), BlocksFormat)  # what no product is of
    quantised = {w.name: w for w in found.weights if not isinstance(w.format, plain)}
    if quantised and config.gemm_strategy not in ("native", "auto"):  # auto: ours are the only ones there are
        raise UsageError(
            f"--gemm-strategy {config.gemm_strategy} computes in 16 bits; use native, or "
            "--quantization none, which expands the weights"
        )
    info = facts.info
    refused: dict[str, list[str]] = {}
    for name, weight in quantised.items():
        assert weight.format is not None
        why = device_format(weight.format).refusal(weight, found.dtype, info)
        if why is not None:
            refused.setdefault(why, []).append(name)
    if refused:
        shown = "; ".join(
            f"{', '.join(names[:3])}{' ...' * (len(names) > 3)}: {why}" for why, names in refused.items()
        )
        raise MissingKernelError(f"{shown}; --quantization none expands the weights to 16 bits")
    return found


def say_expanded(program: Program, checkpoint: Checkpoint | None, config: EngineConfig) -> None:
    """Logs, once at a start, which quantised matrices take 16 bits because no kernel computes on them."""
    line = "" if checkpoint is None or config.quantization == "none" else expanded(program, checkpoint)
    if line:
        logging.getLogger("rvllm").warning("%s; `rvllm plan` lists what is kept how", line)
