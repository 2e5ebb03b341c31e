"""What the GPU backends refuse by name before anything is taken."""

from __future__ import annotations

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.lowering import refuse_unknown
from rvllm.backends.cuda.ops.gemm.cublas import library
from rvllm.backends.cuda.ops.gemm.strategy import USES_CUBLAS
from rvllm.backends.lengths import asked_host_blocks
from rvllm.config import EngineConfig
from rvllm.errors import MissingKernelError, UsageError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size

MIN_CAPABILITY = 80


def check_supported(program: Program, config: EngineConfig) -> None:
    """Raises MissingKernelError or UsageError for what no GPU can run."""
    refuse_unknown(program)
    if program.dtype not in (DType.BF16, DType.F16):
        raise UsageError(f"--dtype {program.dtype.value}: a GPU runs bfloat16 and float16")
    if embedding_size(program) is None and not program.caches:
        raise MissingKernelError(
            f"{program.architecture} without any layer that attends has no KV cache, and the GPU's memory is "
            "planned around one; use --device cpu"
        )
    asked_host_blocks(program, config)
    _check_decode_path(program, config)
    if config.gemm_strategy in USES_CUBLAS:
        library()


def _check_decode_path(program: Program, config: EngineConfig) -> None:
    """Raises UsageError for a decode path that contradicts other flags; see `StepPlanner.plan`."""
    path = config.decode_path
    if path == "batched":
        return
    if embedding_size(program) is not None:
        raise UsageError(
            f"--decode-path {path}: {program.architecture} makes vectors of texts and decodes nothing; "
            "leave the flag away"
        )
    if path == "fp8" and config.quantization not in ("auto", "fp8"):
        raise UsageError(
            f"--decode-path fp8 and --quantization {config.quantization} ask for different weights: "
            "give one of them"
        )
    if path != "fp8" and config.gemm_strategy != "native":
        raise UsageError(
            f"--decode-path {path} computes on the native strategy's weights; with --gemm-strategy "
            f"{config.gemm_strategy} use --decode-path batched"
        )


def check_device(facts: DeviceFacts) -> None:
    """Raises MissingKernelError for a GPU older than any kernel."""
    if facts.capability < MIN_CAPABILITY:
        raise MissingKernelError(
            f"{facts.name} has compute capability {facts.capability / 10:.1f}; kernels exist from "
            f"{MIN_CAPABILITY / 10:.1f} on"
        )
