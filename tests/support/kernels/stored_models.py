"""Whole tiny models from checkpoints as users have them, on the GPU or the emulator and on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.engine.ipc.messages import Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint
from support.kernels.gpu_engine import CONFIG, core_of, run


def check_runs(checkpoint: Checkpoint, vocabulary: int) -> None:
    """Log probabilities of prompts' next tokens as near to float32's as those of weights expanded to
    bfloat16, whose error is that of 16-bit activations and weights; the same bits alone and in company.
    """
    rng = np.random.default_rng(0)
    asked = [
        (rng.integers(0, vocabulary, n).tolist(), Sampling(max_tokens=1, logprobs=5)) for n in (3, 40, 17)
    ]
    config = checkpoint.config

    def found(
        device: str, requests: list[tuple[list[int], Sampling]], quantization: str = "auto"
    ) -> list[dict[int, float]]:
        program = build_program(ModelConfig(config, "tiny"), DType.F32 if device == "cpu" else DType.BF16)
        engine = replace(CONFIG, device=device, max_num_batched_tokens=64, quantization=quantization)
        backend = CpuBackend if device == "cpu" else CudaBackend
        core = core_of(backend.load(program, checkpoint, engine), config)
        outputs = run(core, requests)
        core.close()
        first = [request[0].logprobs[0] for request in outputs]
        return [dict(zip(f.top_ids, f.top_logprobs, strict=True)) for f in first]

    exact, kept = found("cpu", asked), found("cuda", asked)

    def error(others: list[dict[int, float]]) -> float:
        pairs = [(one, other, set(one) & set(other)) for one, other in zip(exact, others, strict=True)]
        assert all(len(common) >= 3 for _, _, common in pairs)
        return max(abs(one[token] - other[token]) for one, other, common in pairs for token in common)

    assert error(kept) < 1.5 * error(found("cuda", asked, "none")) + 0.01
    assert found("cuda", asked[1:2]) == kept[1:2]
