"""MixtralForCausalLM (Jiang et al. 2024): Mistral's block, its MLP one of several experts chosen by token."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, mixture, read_experts
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Mixtral config."""
    dims = blocks.Dims.read(config, default_eps=1e-5)
    rope = read_rope(config, dims.head_dim, default_theta=1_000_000.0)
    window = config.opt_int("sliding_window")
    experts = read_experts(config, "num_local_experts", 8)
    spec = Mixture(
        experts=experts,
        top_k=config.int("num_experts_per_tok", 2, high=experts),
        width=dims.intermediate,
        activation=blocks.read_activation(config, "hidden_act"),
        parts=("w1", "w3", "w2"),
        renormalise=True,
    )

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        y = blocks.self_attention(b, name, normed, f"{source}.self_attn", dims, rope, window=window)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        y = mixture(b, f"{name}.moe", normed, f"{source}.block_sparse_moe", spec)
        blocks.residual(b, f"{name}.moe", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()
