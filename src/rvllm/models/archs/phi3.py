"""Phi3ForCausalLM (Abdin et al. 2024): Phi-3-mini and -medium, Phi-4; fused projections, LongRoPE."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope, rotated_dim
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Phi-3 config."""
    dims = blocks.Dims.read(config, default_eps=1e-5)
    activation = blocks.read_activation(config, "hidden_act")
    rope = read_rope(config, rotated_dim(config, dims.head_dim))
    window = config.opt_int("sliding_window")
    qkv_rows = (dims.heads + 2 * dims.kv_heads) * dims.head_dim

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn = f"{source}.self_attn"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        qkv = blocks.linear(b, f"{name}.qkv", normed, [f"{attn}.qkv_proj"], [qkv_rows], False)
        mixed = blocks.attention(b, name, qkv, dims, rope, window=window)
        y = blocks.project_out(b, name, mixed, attn, dims, bias=False)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        y = blocks.gated_mlp(
            b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation, fused="gate_up_proj"
        )
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()
