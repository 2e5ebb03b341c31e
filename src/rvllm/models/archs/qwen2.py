"""Qwen2ForCausalLM (Yang et al. 2024): Llama's block, biases on q, k, v, windows on some layers."""

from __future__ import annotations

from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Qwen2 config."""
    windows = layer_windows(config)
    return llama.decoder(config, dtype, qkv_bias=True, window=lambda layer: windows[layer])


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Each layer's window: by `layer_types`, or of old from layer `max_window_layers` on."""
    layers = config.int("num_hidden_layers", high=4096)
    if not config.bool("use_sliding_window", False):
        return [None] * layers
    window = config.int("sliding_window", 4096)
    if config.has("layer_types"):
        kinds = config.list("layer_types", length=layers)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise config.fail(
                    "layer_types", f"holds {kind!r}, supported: full_attention, sliding_attention"
                )
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = config.int("max_window_layers", 28, low=0)
    return [window if layer >= first else None for layer in range(layers)]
