"""DeepseekV2ForCausalLM (DeepSeek-AI 2024): latent attention; shared and routed experts in most layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.models.mla import Latent, latent_attention
from rvllm.models.moe import Mixture, cut_shared, mixture, read_experts, read_groups
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, Program


def build(config: ModelConfig, dtype: DType) -> Program:
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

    def attend(b: ProgramBuilder, at: llama.Layer, x: Buffer) -> Buffer:
        return latent_attention(b, at.name, x, f"{at.source}.self_attn", latent, bias=bias)

    def feed(b: ProgramBuilder, at: llama.Layer, x: Buffer) -> Iterable[tuple[str, Buffer]]:
        def mlp(name: str, source: str, width: int) -> tuple[str, Buffer]:
            return name, blocks.gated_mlp(b, name, x, source, width, activation, bias=mlp_bias)

        source = f"{at.source}.mlp"
        if spec is None or at.number < first or at.number % every:
            yield mlp(f"{at.name}.mlp", source, dims.intermediate)
            return
        yield f"{at.name}.moe", mixture(b, f"{at.name}.moe", x, source, spec)
        if shared and not spec.always:
            yield mlp(f"{at.name}.shared", f"{source}.shared_experts", shared * spec.width)

    return llama.pre_norm(config, dtype, dims, attend, feed)


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
