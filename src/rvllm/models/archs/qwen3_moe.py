"""Qwen3MoeForCausalLM (Yang et al. 2025): Qwen3's attention, and experts in all or in some of the layers."""

from __future__ import annotations

from collections.abc import Iterable

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, mixture, read_experts
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, Program


def build(config: ModelConfig, dtype: DType) -> Program:
    dims = blocks.Dims.read(config)
    window = config.int("sliding_window", 4096) if config.bool("use_sliding_window", False) else None
    spec = read_mixture(config)
    sparse = sparse_layers(config, dims.layers)

    def feed(b: ProgramBuilder, at: llama.Layer, x: Buffer) -> Iterable[tuple[str, Buffer]]:
        name, mlp = f"{at.name}.mlp", f"{at.source}.mlp"
        if sparse[at.number]:
            yield name, mixture(b, f"{at.name}.moe", x, mlp, spec)
        else:
            yield name, blocks.gated_mlp(b, name, x, mlp, dims.intermediate, spec.activation)

    return llama.decoder(config, dtype, dims, head_norms=True, window=lambda at: window, feed=feed)


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
