"""GemmaForCausalLM (Gemma Team 2024): norms with 1 + w, GeGLU, scaled embeddings, heads of 256."""

from __future__ import annotations

import math

import numpy as np

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activation, Program

HEAD_DIM = 256  # when the config does not say


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a Gemma config."""
    refuse_bidirectional(config)
    dims = blocks.Dims.read(config, head_dim=HEAD_DIM)
    activation = read_activation(config)
    bias = config.bool("attention_bias", False)
    rope = read_rope(config, dims.head_dim)

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims, scale=embedding_scale(dims.hidden, dtype))
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"

        normed = blocks.rms_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps, add=1.0)
        y = blocks.self_attention(
            b, name, normed, f"{source}.self_attn", dims, rope, qkv_bias=bias, out_bias=bias
        )
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.rms_norm(
            b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps, add=1.0
        )
        y = blocks.gated_mlp(b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps, add=1.0)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", True))
    return b.finish()


def embedding_scale(hidden: int, dtype: DType) -> float:
    """sqrt(hidden), rounded to the model's dtype as the published code does before it multiplies."""
    return float(np.asarray(math.sqrt(hidden), dtype=dtype.numpy))


def read_activation(config: ModelConfig) -> Activation:
    """The gate's activation; `gelu` in the first releases' configs always meant the tanh form."""
    field = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    activation = blocks.read_activation(config, field, "gelu_pytorch_tanh")
    return "gelu_tanh" if activation == "gelu" else activation


def refuse_bidirectional(config: ModelConfig) -> None:
    """Raises ModelError for Gemma's embedding models, whose tokens see what follows them."""
    if config.bool("use_bidirectional_attention", False):
        raise config.fail("use_bidirectional_attention", "is true; only causal models generate text")
