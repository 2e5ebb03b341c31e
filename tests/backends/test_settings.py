"""Settings that mean nothing on a device are told, and memory flags that contradict each other refused."""

from __future__ import annotations

import pytest

from rvllm.backends.load import CPU_ONLY, GPU_ONLY, check_memory_flags, without_effect
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
PROGRAM = build_program(ModelConfig(LLAMA, "a test"), DType.F32)
BLOCK = 16 * 4 * 2 * 2 * 2 * 8  # tokens, bytes, layers, keys and values, heads, width


def test_what_means_nothing_on_a_device_is_told() -> None:
    config = EngineConfig(
        gemm_strategy="hybrid", num_gpu_blocks=4096, gpu_memory_reserve_gb=8.0, threads=2, num_cpu_blocks=9
    )
    assert without_effect(config, "cpu") == [
        "--gpu-memory-reserve-gb 8.0",
        "--num-gpu-blocks 4096",
        "--gemm-strategy hybrid",
    ]
    assert without_effect(config, "cuda") == ["--threads 2"]
    assert not without_effect(EngineConfig(), "cpu") and not without_effect(EngineConfig(), "cuda")
    assert {*GPU_ONLY, *CPU_ONLY} <= set(vars(EngineConfig()))


@pytest.mark.parametrize(
    ("settings", "device", "says"),
    [
        ({"num_blocks": 100, "kv_cache_memory_gb": 1.5}, "cpu",
         f"--num-blocks 100 (100 blocks, {100 * BLOCK / 1e9:.3f} GB) and --kv-cache-memory-gb 1.5 "
         f"({15 * 10**8 // BLOCK:,} blocks"),
        ({"num_blocks": 100, "num_gpu_blocks": 99}, "cuda", "--num-gpu-blocks 99 (99 blocks"),
        ({"num_gpu_blocks": 99, "kv_cache_memory_gb": 2.0}, "cuda", "--kv-cache-memory-gb 2"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(settings: dict, device: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_memory_flags(PROGRAM, EngineConfig(**settings), device)
    assert says in str(caught.value) and str(caught.value).endswith("give one of them")


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_blocks": 100}, {"num_blocks": 100, "num_gpu_blocks": 100}, {"kv_cache_memory_gb": 1.0}],
)
def test_flags_that_agree_are_taken(settings: dict) -> None:
    for device in ("cpu", "cuda"):
        check_memory_flags(PROGRAM, EngineConfig(**settings), device)
