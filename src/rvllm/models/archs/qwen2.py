"""Qwen2ForCausalLM (Yang et al. 2024): Llama's block, biases on q, k, v, windows on some layers."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    windows = layer_windows(config)
    return llama.decoder(config, dtype, qkv_bias=True, window=lambda layer: windows[layer])


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Each layer's window: by `layer_types`, or of old from layer `max_window_layers` on."""
    layers = config.int("num_hidden_layers", high=4096)
    if not config.bool("use_sliding_window", False):
        return [None] * layers
    window = config.int("sliding_window", 4096)
    sliding = blocks.layer_types(config, layers)
    if sliding is None:
        first = config.int("max_window_layers", 28, low=0)
        sliding = [layer >= first for layer in range(layers)]
    return [window if flag else None for flag in sliding]
