"""Qwen3MoeForCausalLM (Yang et al. 2025): Qwen3's attention, and experts in all or in some of the layers."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, mixture, read_experts
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Qwen3-MoE config."""
    dims = blocks.Dims.read(config)
    bias = config.bool("attention_bias", False)
    rope = read_rope(config, dims.head_dim)
    window = config.int("sliding_window", 4096) if config.bool("use_sliding_window", False) else None
    spec = read_mixture(config)
    sparse = sparse_layers(config, dims.layers)

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn, mlp = f"{source}.self_attn", f"{source}.mlp"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        qkv = blocks.project_qkv(b, name, normed, attn, dims, bias=bias)
        q, k = (Part(f"{attn}.{which}_norm.weight", (dims.head_dim,)) for which in "qk")
        blocks.head_norms(b, name, qkv, dims, ([q], [k]))
        mixed = blocks.attention(b, name, qkv, dims, rope, window=window)
        y = blocks.project_out(b, name, mixed, attn, dims, bias=bias)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        if sparse[layer]:
            y = mixture(b, f"{name}.moe", normed, mlp, spec)
        else:
            y = blocks.gated_mlp(b, f"{name}.mlp", normed, mlp, dims.intermediate, spec.activation)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()


def read_mixture(config: ModelConfig) -> Mixture:
    """The routed experts. The shares of the chosen ones are renormalised where the config says so."""
    count = "num_experts" if config.has("num_experts") else "num_local_experts"
    experts = read_experts(config, count, 128)
    return Mixture(
        experts=experts,
        top_k=config.int("num_experts_per_tok", 8, high=experts),
        width=config.int("moe_intermediate_size", 768),
        activation=blocks.read_activation(config, "hidden_act"),
        renormalise=config.bool("norm_topk_prob", False),
    )


def sparse_layers(config: ModelConfig, layers: int) -> list[bool]:
    """Which layers have experts: each `decoder_sparse_step`-th, but for those in `mlp_only_layers`."""
    every = config.int("decoder_sparse_step", 1)
    dense = config.list("mlp_only_layers", [])
    return [(layer + 1) % every == 0 and layer not in dense for layer in range(layers)]
