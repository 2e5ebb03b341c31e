"""What quantised models take of a card: the ledger of the published 7B and 32B shapes, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.known_gpus import CONTEXT_BYTES, known_gpu
from rvllm.backends.cuda.layout.memory import budget_of
from rvllm.backends.cuda.layout.preview import MemoryPreview, preview
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from support.models.real_configs import CONFIGS
from support.weights.stored_as import Layout

SHAPES: dict[str, dict[str, Any]] = {
    "7B": CONFIGS["Qwen2.5-7B"],
    "32B": {**CONFIGS["Qwen2.5-7B"], "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "num_key_value_heads": 8},
}  # fmt: skip
# Bits an element: of matrices in layers and the head as kernels read them, of embeddings. Integers have a
# 32-bit word of scales a row and group; heads and embeddings are 16 bits, but in GGUF, whose blocks they
# stay in.
BITS = {
    "BF16": (16, 16, 16), "fp8": (8, 16, 16), "int8": (8 + 32 / 128, 16, 16), "gptq": (4 + 32 / 128, 16, 16),
    "Q8_0": (9, 9, 8.5), "Q6_K": (7, 7, 6.5625), "Q4_K": (5, 5, 4.5),
}  # fmt: skip


def weight_bytes(shape: str, stored: str) -> float:
    """By the published parameter counts."""
    c, (layers, head, table) = SHAPES[shape], BITS[stored]
    hidden, kv = c["hidden_size"], 128 * c["num_key_value_heads"]
    each = hidden * (2 * hidden + 2 * kv) + 3 * hidden * c["intermediate_size"]
    return (c["num_hidden_layers"] * each * layers + c["vocab_size"] * hidden * (head + table)) / 8


def planned(
    shape: str, stored: str, gpu: str, vram_gb: float | None = None, **settings: object
) -> MemoryPreview:
    program = build_program(ModelConfig(SHAPES[shape], shape), DType.BF16)
    config, facts = EngineConfig(**settings), known_gpu(gpu, vram_gb)  # type: ignore[arg-type]
    program = kept(program, Layout(program, stored), config, facts)
    return preview(program, config, facts, budget_of(config, facts.memory - CONTEXT_BYTES, facts.memory))


@pytest.mark.parametrize("stored", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_take_what_their_format_says(shape: str, stored: str) -> None:
    found = planned(shape, stored, "h200")
    assert found.lines["weights"] == pytest.approx(weight_bytes(shape, stored), rel=0.01)
    assert sum(found.lines.values()) == found.total


def test_a_32b_in_four_bits_on_a_card_of_24_gb() -> None:
    found = planned("32B", "gptq", "rtx-4090", max_num_seqs=4, max_num_batched_tokens=512,
                    gpu_memory_utilization=0.97)  # fmt: skip
    assert found.limits["tokens they hold"] >= 16_384


def test_a_7b_in_four_bits_with_8_gb() -> None:
    for stored in ("gptq", "Q4_K"):
        found = planned("7B", stored, "rtx-4090", 8, max_num_seqs=8, max_num_batched_tokens=512)
        assert found.limits["tokens they hold"] >= 8192
