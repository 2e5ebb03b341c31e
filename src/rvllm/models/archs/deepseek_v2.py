"""DeepseekV2ForCausalLM (DeepSeek-AI 2024): latent attention; shared and routed experts in most layers."""

from __future__ import annotations

from dataclasses import replace

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.mla import Latent, latent_attention
from rvllm.models.moe import Mixture, cut_shared, mixture, read_experts, read_groups
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a DeepSeek-V2 config."""
    config.str("scoring_func", "softmax", choices=("softmax",))
    return decoder(config, dtype, read_mixture(config) if config.has("n_routed_experts") else None)


def decoder(config: ModelConfig, dtype: DType, spec: Mixture | None) -> Program:
    """Latent attention in every layer; experts, if there are any, from layer `first_k_dense_replace` on."""
    dims = blocks.Dims.read(config)
    latent = Latent.read(config)
    activation = blocks.read_activation(config, "hidden_act")
    bias = config.bool("attention_bias", False)
    mlp_bias = config.bool("mlp_bias", False)
    shared = config.int("n_shared_experts", 0, low=0, high=65536)
    if spec is not None:
        spec = replace(spec, always=cut_shared(shared * spec.width, spec.width, bias=mlp_bias))
    first = config.int("first_k_dense_replace", 0, low=0)
    every = config.int("moe_layer_freq", 1)

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        mlp = f"{source}.mlp"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        y = latent_attention(b, name, normed, f"{source}.self_attn", latent, bias=bias)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        if spec is None or layer < first or layer % every:
            y = blocks.gated_mlp(
                b, f"{name}.mlp", normed, mlp, dims.intermediate, activation, bias=mlp_bias
            )  # fmt: skip
            blocks.residual(b, f"{name}.mlp", x, y)
            continue
        y = mixture(b, f"{name}.moe", normed, mlp, spec)
        blocks.residual(b, f"{name}.moe", x, y)
        if shared and not spec.always:
            experts = f"{mlp}.shared_experts"
            y = blocks.gated_mlp(
                b, f"{name}.shared", normed, experts, shared * spec.width, activation, bias=mlp_bias
            )
            blocks.residual(b, f"{name}.shared", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()


def read_mixture(config: ModelConfig) -> Mixture:
    """The routed experts: by score alone, or from the groups with the best expert.

    The published code scales the chosen shares, or renormalises them where `norm_topk_prob` says so, never
    both.
    """
    experts = read_experts(config, "n_routed_experts")
    top_k = config.int("num_experts_per_tok", high=experts)
    method = config.str("topk_method", "greedy", choices=("greedy", "group_limited_greedy"))
    groups, kept = read_groups(config, experts, top_k) if method == "group_limited_greedy" else (1, 1)
    renormalise = config.bool("norm_topk_prob", False) and top_k > 1
    return Mixture(
        experts=experts,
        top_k=top_k,
        width=config.int("moe_intermediate_size"),
        activation=blocks.read_activation(config, "hidden_act"),
        groups=groups,
        kept_groups=kept,
        renormalise=renormalise,
        scale=1.0 if renormalise else config.float("routed_scaling_factor", 1.0),
    )
