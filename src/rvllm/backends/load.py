"""Chooses the backend and the element type; loads a program onto the device asked for."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from rvllm.backends.base import Encoder, Generator, Progress
from rvllm.backends.opening import gpu_present
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.extras import install_command
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size
from rvllm.settings import flag_of, given_settings
from rvllm.weights.checkpoint import Checkpoint

# Settings that mean something on one kind of device only.
GPU_ONLY = (
    "gpu_memory_utilization", "gpu_memory_share", "gpu_memory_reserve_gb", "gemm_strategy", "decode_path",
    "capture_graphs", "check_device_memory",
)  # fmt: skip
CPU_ONLY = ("threads", "cpu_kernels")


def without_effect(config: EngineConfig, device: str) -> list[str]:
    """The settings that were given and mean nothing on this device (`cpu` or `cuda`), as they are written."""
    names = {flag_of(name) for name in (GPU_ONLY if device == "cpu" else CPU_ONLY)}
    return [f"{flag} {value}" for flag, value in given_settings(config).items() if flag in names]


def cuda_packages_present() -> bool:
    """Whether the packages of the extra `cuda` are installed; imports none of them."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def choose_device(config: EngineConfig) -> str:
    """`cpu` or `cuda`. Raises UsageError when a GPU is asked for, or there, and cannot be used."""
    if config.device == "cpu":
        return "cpu"
    if config.device == "auto" and not gpu_present():
        return "cpu"
    if not gpu_present():
        raise UsageError("--device cuda: no NVIDIA GPU is visible on this machine; use --device cpu")
    if not cuda_packages_present():
        raise UsageError(
            f"this machine's GPU needs NVIDIA's bindings: {install_command('cuda', 'compiler')} "
            "(or run with --device cpu)"
        )
    return "cuda"


def choose_dtype(config: EngineConfig, checkpoint: Checkpoint | None) -> DType:
    """The element type of weights and activations.

    auto: float32 on the CPU; on a GPU the 16-bit type the checkpoint's config names, else bfloat16.
    """
    on_cpu = config.dtype == "auto" and choose_device(config) == "cpu"
    return DType.F32 if on_cpu else gpu_dtype(config, checkpoint)


def gpu_dtype(config: EngineConfig, checkpoint: Checkpoint | None) -> DType:
    """The type on a GPU: as asked, else the 16-bit type that the checkpoint's config names, else bfloat16."""
    if config.dtype != "auto":
        return DType.parse(config.dtype)
    values: Any = {} if checkpoint is None else checkpoint.config
    named = str(values.get("dtype") or values.get("torch_dtype") or "")
    return DType.F16 if named.removeprefix("torch.") in ("float16", "half") else DType.BF16


def load_backend(
    program: Program, checkpoint: Checkpoint | None, config: EngineConfig, progress: Progress | None = None
) -> Generator | Encoder:
    """The program loaded on the device that `config.device` asks for; see `choose_device` for refusals.

    checkpoint None fills random weights, as does --load-format dummy.
    """
    if config.load_format == "dummy":
        checkpoint = None
    device = choose_device(config)
    if idle := without_effect(config, device):
        where = "the CPU" if device == "cpu" else "a GPU"
        logging.getLogger("rvllm").warning("without effect on %s: %s", where, ", ".join(idle))
    if device == "cpu":
        if config.quantization == "fp8":
            raise UsageError("--quantization fp8 is for GPUs; leave the flag away on the CPU")
        from rvllm.backends.cpu.backend import CpuBackend, CpuEncoder

        loaded: type[CpuBackend | CpuEncoder] = CpuBackend if embedding_size(program) is None else CpuEncoder
        return loaded.load(program, checkpoint, config, progress)
    kind = ("backend", "CudaBackend")
    if embedding_size(program) is not None:
        kind = ("pooler", "CudaPooler") if program.caches else ("encoder", "CudaEncoder")
    module = importlib.import_module(f"rvllm.backends.cuda.{kind[0]}")
    from rvllm.backends.cuda.loaded_model import given_back_on_failure

    with given_back_on_failure():
        backend: Generator | Encoder = getattr(module, kind[1]).load(program, checkpoint, config, progress)
    return backend
