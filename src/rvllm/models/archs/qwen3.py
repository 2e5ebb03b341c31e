"""Qwen3ForCausalLM (Yang et al. 2025): Llama's block with an RMSNorm on every query and key head."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.archs.qwen2 import layer_windows
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    dims = blocks.Dims.read(config, head_dim=128)
    windows = layer_windows(config)
    return llama.decoder(config, dtype, dims, head_norms=True, window=lambda at: windows[at])
