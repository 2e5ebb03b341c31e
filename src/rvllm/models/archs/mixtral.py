"""MixtralForCausalLM (Jiang et al. 2024): Mistral's block, its MLP one of several experts chosen by token."""

from __future__ import annotations

from collections.abc import Iterable

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, mixture, read_experts
from rvllm.models.rope import read_rope
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, Program


def build(config: ModelConfig, dtype: DType) -> Program:
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

    def feed(b: ProgramBuilder, at: llama.Layer, x: Buffer) -> Iterable[tuple[str, Buffer]]:
        name = f"{at.name}.moe"
        yield name, mixture(b, name, x, f"{at.source}.block_sparse_moe", spec)

    return llama.decoder(config, dtype, dims, qkv_bias=False, rope=rope, window=lambda at: window, feed=feed)
