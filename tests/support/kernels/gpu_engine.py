"""Tiny models on both backends, driven through the same engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rvllm.backends.base import Backend
from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.device.driver import device_count
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Output, Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.kv_cache import with_kv_cache
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from support.models.tiny import ArrayCheckpoint, weights_of

needs_gpu = pytest.mark.skipif(device_count() == 0, reason="no NVIDIA GPU or no cuda-bindings here")
ROUND = {DType.BF16: ml_dtypes.bfloat16, DType.F16: np.float16}
CONFIG = EngineConfig(max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks=128, num_blocks=128)


def model(architecture: str = "LlamaForCausalLM", **fields: Any) -> dict[str, Any]:
    """A tiny config with head sizes that the attention kernels have."""
    base = {
        "architectures": [architecture], "vocab_size": 515, "hidden_size": 192, "intermediate_size": 328,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    return {**base, **fields}


def backend(config: Mapping[str, Any], device: str, dtype: DType, engine: EngineConfig = CONFIG) -> Backend:
    """The model with weights that are exact in `dtype`, on the CPU (float32) or the GPU."""
    plain = build_program(ModelConfig(config, "tiny"), DType.F32 if device == "cpu" else dtype)
    program = with_kv_cache(plain, engine.kv_cache_dtype)
    arrays = {k: v.astype(ROUND[dtype]).astype(np.float32) for k, v in weights_of(program).items()}
    checkpoint = ArrayCheckpoint(config, arrays)
    engine = replace(engine, device=device)
    if device == "cpu":
        return CpuBackend.load(program, checkpoint, engine)
    from rvllm.backends.cuda.backend import CudaBackend

    return CudaBackend.load(program, checkpoint, engine)


def core_of(loaded: Backend, config: Mapping[str, Any], engine: EngineConfig = CONFIG) -> EngineCore:
    """An engine over a loaded backend."""
    facts = ModelFacts(
        architecture=config["architectures"][0],
        model_path="tiny",
        vocab_size=config["vocab_size"],
        max_model_len=loaded.limits.max_model_len,
        eos_token_ids=[],
        bos_token_id=None,
    )
    return EngineCore(loaded, facts, engine)


def run(core: EngineCore, requests: Sequence[tuple[list[int], Sampling]]) -> list[list[Output]]:
    """All outputs of each request, submitted together."""
    found: dict[str, list[Output]] = {str(i): [] for i in range(len(requests))}
    for i, (prompt, sampling) in enumerate(requests):
        core.add_request(Generate(str(i), prompt, sampling))
    while core.has_work():
        for output in core.step():
            found[output.request_id].append(output)
    return list(found.values())


def check_company(core: EngineCore, requests: Sequence[tuple[list[int], Sampling]]) -> None:
    """Requests give the same bits alone, together, and with prefixes from the cache."""
    together, again = run(core, requests), run(core, requests)
    for request, *others in zip(requests, together, again, strict=True):
        (alone,) = run(core, [request])
        for outputs in others:
            assert tokens_of(outputs) == tokens_of(alone)
            assert [o.logprobs for o in outputs] == [o.logprobs for o in alone]


def check_draws(ours: list[list[Output]], theirs: list[list[Output]], limit: float, close: float) -> None:
    """Draws have the same log-probabilities up to `limit`, and differ first where two were `close`."""
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            (one,), (best,) = a.logprobs or [], b.logprobs or []
            assert one.logprob == pytest.approx(best.logprob, abs=limit)
            if tokens_of([a]) != tokens_of([b]):
                assert best.top_logprobs[0] - best.top_logprobs[1] < close
                break


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    """The tokens a request drew."""
    return [token for output in outputs for token in output.token_ids]
