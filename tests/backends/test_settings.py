"""Settings that mean nothing on a device are told, and memory flags that contradict each other refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from rvllm.backends.lengths import asked_blocks
from rvllm.backends.load import CPU_ONLY, GPU_ONLY, gpu_dtype, without_effect
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
PROGRAM = build_program(ModelConfig(LLAMA, "a test"), DType.F32)
BLOCK = 16 * 4 * 2 * 2 * 2 * 8  # tokens, bytes, layers, keys and values, heads, width


def test_what_means_nothing_on_a_device_is_told() -> None:
    config = EngineConfig(
        gemm_strategy="hybrid", num_blocks=4096, gpu_memory_reserve_gb=8.0, threads=2, num_cpu_blocks=9
    )
    assert without_effect(config, "cpu") == [
        "--gpu-memory-reserve-gb 8.0",
        "--gemm-strategy hybrid",
    ]
    assert without_effect(config, "cuda") == ["--threads 2"]
    assert not without_effect(EngineConfig(), "cpu") and not without_effect(EngineConfig(), "cuda")
    assert {*GPU_ONLY, *CPU_ONLY} <= set(vars(EngineConfig()))


def test_two_flags_for_the_size_of_the_kv_cache_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        asked_blocks(PROGRAM, EngineConfig(num_blocks=100, kv_cache_memory_gb=1.5), BLOCK)
    said = f"--num-blocks 100 takes {100 * BLOCK / 1e9:.2f} GB for the KV cache"
    held = f"--kv-cache-memory-gb 1.5 holds {15 * 10**8 // BLOCK} blocks"
    assert str(caught.value) == f"{said}, and {held}: give one of them"


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [({}, None), ({"num_blocks": 100}, 100), ({"kv_cache_memory_gb": 7 * BLOCK / 1e9}, 7)],
)
def test_one_flag_for_the_size_of_the_kv_cache_is_taken(settings: dict, blocks: int | None) -> None:
    assert asked_blocks(PROGRAM, EngineConfig(**settings), BLOCK) == blocks


@pytest.mark.parametrize(
    ("named", "dtype"),
    [
        ({"dtype": "float16"}, DType.F16),
        ({"torch_dtype": "torch.float16"}, DType.F16),
        ({"torch_dtype": "half"}, DType.F16),
        ({"torch_dtype": "bfloat16"}, DType.BF16),
        ({"torch_dtype": "float32"}, DType.BF16),
        ({}, DType.BF16),
    ],
)
def test_a_gpu_takes_the_16_bit_type_that_a_config_names(named: dict, dtype: DType) -> None:
    checkpoint = cast(Checkpoint, SimpleNamespace(config=named))
    assert gpu_dtype(EngineConfig(), checkpoint) is dtype
    assert gpu_dtype(EngineConfig(dtype="float16"), checkpoint) is DType.F16
