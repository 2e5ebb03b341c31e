"""Qwen3ForCausalLM (Yang et al. 2025): Llama's block with an RMSNorm on every query and key head."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs.qwen2 import layer_windows
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Qwen3 config."""
    dims = blocks.Dims.read(config, head_dim=128)
    activation = blocks.read_activation(config, "hidden_act")
    bias = config.bool("attention_bias", False)
    rope = read_rope(config, dims.head_dim)
    windows = layer_windows(config)

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn = f"{source}.self_attn"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        qkv = blocks.project_qkv(b, name, normed, attn, dims, bias=bias)
        q, k = (Part(f"{attn}.{which}_norm.weight", (dims.head_dim,)) for which in "qk")
        blocks.head_norms(b, name, qkv, dims, ([q], [k]))
        mixed = blocks.attention(b, name, qkv, dims, rope, window=windows[layer])
        y = blocks.project_out(b, name, mixed, attn, dims, bias=bias)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        y = blocks.gated_mlp(b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()
