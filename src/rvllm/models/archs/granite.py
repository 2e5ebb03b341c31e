"""GraniteForCausalLM (Granite 3, 4 dense): Llama's block with muP-like multipliers."""

from __future__ import annotations

from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    scales = llama.Scales(
        embedding=config.float("embedding_multiplier", 1.0),
        attention=config.float("attention_multiplier", 1.0),
        residual=config.float("residual_multiplier", 1.0),
        logits=1.0 / config.float("logits_scaling", 1.0, low=1e-6),
    )
    return llama.decoder(config, dtype, mlp_bias=config.bool("mlp_bias", False), scales=scales)
