"""LlamaForCausalLM (Touvron et al. 2023): Llama 1-3, CodeLlama, Vicuna, SmolLM2 and their kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


@dataclass(frozen=True)
class Scales:
    """Constants that some relatives multiply with; None is 1 / sqrt(head_dim)."""

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Llama config."""
    bias = config.bool("attention_bias", False)
    return decoder(config, dtype, qkv_bias=bias, out_bias=bias, mlp_bias=config.bool("mlp_bias", False))


def decoder(
    config: ModelConfig,
    dtype: DType,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    window: Callable[[int], int | None] = lambda layer: None,
    rotated: Callable[[int], bool] = lambda layer: True,
    tied: bool = False,
    default_theta: float = 10_000.0,
    scales: Scales = Scales(),
) -> Program:
    """Pre-norm decoder with SwiGLU; its relatives differ in biases, scales, and each layer's window and rope.

    tied, default_theta: whether the head is the embedding, and rope's base, when the config does not say.
    """
    dims = blocks.Dims.read(config)
    activation = blocks.read_activation(config, "hidden_act")
    rope = read_rope(config, dims.head_dim, default_theta=default_theta)

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims, scale=scales.embedding)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        y = blocks.self_attention(
            b, name, normed, f"{source}.self_attn", dims, rope if rotated(layer) else None,
            qkv_bias=qkv_bias, out_bias=out_bias, window=window(layer), scale=scales.attention,
        )  # fmt: skip
        blocks.residual(b, f"{name}.attn", x, y, scales.residual)

        normed = blocks.rms_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        y = blocks.gated_mlp(
            b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation, bias=mlp_bias
        )
        blocks.residual(b, f"{name}.mlp", x, y, scales.residual)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", tied), scale=scales.logits)
    return b.finish()
