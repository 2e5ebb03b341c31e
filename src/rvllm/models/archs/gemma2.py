"""Gemma2ForCausalLM (Gemma Team 2024): norms around both blocks, soft-caps, windows in every second layer."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import gemma
from rvllm.models.config import ModelConfig
from rvllm.models.rope import max_positions, read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, Program
from rvllm.program.rope import Rope


def build(config: ModelConfig, dtype: DType) -> Program:
    rope = read_rope(config, read_dims(config).head_dim)
    return decoder(
        config, dtype, pattern=2, ropes=(rope, rope), positions=max_positions(config, 8192),
        attention_cap=config.opt_float("attn_logit_softcapping", 50.0, low=1e-6),
        final_cap=config.opt_float("final_logit_softcapping", 30.0, low=1e-6),
    )  # fmt: skip


def decoder(
    config: ModelConfig,
    dtype: DType,
    *,
    pattern: int,
    ropes: tuple[Rope, Rope],
    positions: int,
    qk_norm: bool = False,
    attention_cap: float | None = None,
    final_cap: float | None = None,
    root: str = "",
) -> Program:
    """Gemma's block with norms before and after; ropes are those of layers with and without a window.

    root: what the checkpoint puts before every tensor's name.
    """
    gemma.refuse_bidirectional(config)
    dims = read_dims(config)
    activation = gemma.read_activation(config)
    bias = config.bool("attention_bias", False)
    window = config.int("sliding_window", 4096)
    sliding = blocks.sliding_layers(config, dims.layers, pattern)
    scale = config.float("query_pre_attn_scalar", 256.0, low=1e-6) ** -0.5

    b = blocks.start(config, dtype, dims, positions=positions)

    def norm(name: str, x: Buffer, source: str) -> Buffer:
        return blocks.rms_norm(b, name, x, source, dims.eps, add=1.0)

    table = f"{root}model.embed_tokens.weight"
    x = blocks.embed(b, dims, table, gemma.embedding_scale(dims.hidden, dtype))
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"{root}model.layers.{layer}"
        attn = f"{source}.self_attn"
        layer_window, rope = (window, ropes[0]) if sliding[layer] else (None, ropes[1])

        y = norm(f"{name}.attn_norm", x, f"{source}.input_layernorm")
        y = blocks.self_attention(
            b, name, y, attn, dims, rope, qkv_bias=bias, out_bias=bias, window=layer_window, scale=scale,
            soft_cap=attention_cap, norms=blocks.HeadNorms.shared(attn, dims, 1.0) if qk_norm else None,
        )  # fmt: skip
        y = norm(f"{name}.attn_post_norm", y, f"{source}.post_attention_layernorm")
        blocks.residual(b, f"{name}.attn", x, y)

        y = norm(f"{name}.mlp_norm", x, f"{source}.pre_feedforward_layernorm")
        y = blocks.gated_mlp(b, f"{name}.mlp", y, f"{source}.mlp", dims.intermediate, activation)
        y = norm(f"{name}.mlp_post_norm", y, f"{source}.post_feedforward_layernorm")
        blocks.residual(b, f"{name}.mlp", x, y)

    last = norm("final_norm", blocks.select(b, x), f"{root}model.norm")
    blocks.head(
        b, last, dims, tied=config.bool("tie_word_embeddings", True), soft_cap=final_cap,
        source=f"{root}lm_head.weight", embed_source=table,
    )  # fmt: skip
    return b.finish()


def read_dims(config: ModelConfig) -> blocks.Dims:
    """The dimensions under Gemma's defaults."""
    return blocks.Dims.read(config, head_dim=gemma.HEAD_DIM)
