"""Mixtures from quantised checkpoints, run as they are stored, against float32 on the CPU."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import device_count
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Experts
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.formats import with_formats
from rvllm.weights.open import open_checkpoint
from support.emulator import available
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import model
from support.kernels.stored_models import check_runs
from support.models import archs_moe_gguf, archs_tiny
from support.models.arch_cases import MODELS
from support.weights.quantisers import (
    FP8,
    GPTQ,
    Quantiser,
    Tensors,
    compressed,
    fp8_blocks,
    gptq,
    int8_zeros,
    save_quantised,
)

pytestmark = pytest.mark.skipif(not available() and device_count() == 0, reason="needs g++ or a GPU")
MIXTRAL = model(
    "MixtralForCausalLM", num_hidden_layers=1, hidden_size=128, intermediate_size=96, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
# Two shared experts, which are cut out of one wider MLP: rows of its first matrices, columns of its last.
DEEPSEEK_V2 = MODELS["deepseek_v2_lite"].config | {
    "num_hidden_layers": 2, "vocab_size": 515, "intermediate_size": 328, "moe_intermediate_size": 128,
    "max_position_embeddings": 1024,
}  # fmt: skip


def ordered_by_expert(quantiser: Quantiser) -> Quantiser:
    """Gates and ups of an expert in one order of columns, each expert in its own."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        seed = zlib.crc32(f"{name.rpartition('.')[0]} {matrix.shape[1]}".encode())
        return quantiser(name, matrix, np.random.default_rng(seed))

    return quantise


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Quantiser]] = {
    "mixtral, gptq": (MIXTRAL, GPTQ | {"bits": 4, "group_size": 32}, gptq(4, 32)),
    "mixtral, gptq in order of importance, padded": (
        MIXTRAL, GPTQ | {"bits": 4, "group_size": 40, "desc_act": True},
        ordered_by_expert(gptq(4, 40, desc_act=True)),
    ),
    "mixtral, int8 with zeros": (
        MIXTRAL, compressed("int-quantized", num_bits=8, type="int"), int8_zeros(True)
    ),
    "deepseek_v2, fp8": (DEEPSEEK_V2, FP8 | {"weight_block_size": [128, 128]}, fp8_blocks(128, 128)),
}  # fmt: skip
PLAIN = ("embed", "lm_head", "norm", "gate.weight")


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    if device_count() > 0:
        yield
    else:
        with emulated_driver():
            yield


def check(checkpoint: Checkpoint) -> None:
    """All experts keep their format, and the model's scores are as near to float32's as they can be."""
    config = checkpoint.config
    program = with_formats(build_program(ModelConfig(config, "tiny"), DType.BF16), checkpoint, "auto")
    experts = [op for op in program.ops if isinstance(op, Experts)]
    assert experts and all(op.up.format and op.down.format for op in experts)
    check_runs(checkpoint, config["vocab_size"])


def test_stacks_of_a_gguf_file(tmp_path: Path) -> None:
    """As llama.cpp writes them: one tensor for all experts of a layer."""
    config = model(
        "Qwen3MoeForCausalLM", num_hidden_layers=1, hidden_size=128, moe_intermediate_size=96, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    tensors = archs_tiny.random_tensors("mixture", config)
    path = tmp_path / "m.gguf"
    archs_moe_gguf.write(path, config, tensors, quantised=gguf.GGMLQuantizationType.Q5_0)
    check(open_checkpoint(path))


@pytest.mark.parametrize("case", CASES)
def test_mixtures_keep_their_format(case: str, tmp_path: Path) -> None:
    config, quantisation, quantise = CASES[case]

    def wanted(name: str, numbers: np.ndarray) -> bool:
        return numbers.ndim == 2 and not any(plain in name for plain in PLAIN)

    tensors = archs_tiny.random_tensors("mixture", config)
    save_quantised(tmp_path, config, tensors, quantisation, quantise, wanted, seed=2)
    check(open_checkpoint(tmp_path))
