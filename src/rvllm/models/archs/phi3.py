"""Phi3ForCausalLM (Abdin et al. 2024): Phi-3-mini and -medium, Phi-4; fused projections, LongRoPE."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope, rotated_dim
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    dims = blocks.Dims.read(config, default_eps=1e-5)
    rope = read_rope(config, rotated_dim(config, dims.head_dim))
    window = config.opt_int("sliding_window")
    return llama.decoder(config, dtype, dims, qkv_bias=False, fused=True, rope=rope, window=lambda at: window)
