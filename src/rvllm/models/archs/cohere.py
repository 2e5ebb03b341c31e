"""CohereForCausalLM (Command-R, Aya): attention and MLP side by side on one LayerNorm without bias."""

from __future__ import annotations

from collections.abc import Callable

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program


def build(config: ModelConfig, dtype: DType) -> Program:
    return decoder(config, dtype, qk_norm=config.bool("use_qk_norm", False), default_theta=500_000.0)


def decoder(
    config: ModelConfig,
    dtype: DType,
    *,
    qk_norm: bool = False,
    default_theta: float = 10_000.0,
    window: Callable[[int], int | None] = lambda layer: None,
    rotated: Callable[[int], bool] = lambda layer: True,
) -> Program:
    """x + attention(norm(x)) + mlp(norm(x)); each layer may have a window, and may do without rope."""
    dims = blocks.Dims.read(config, eps="layer_norm_eps", default_eps=1e-5)
    activation = blocks.read_activation(config, "hidden_act")
    bias = config.bool("attention_bias", False)
    rope = read_rope(config, dims.head_dim, interleaved=True, default_theta=default_theta)

    # Command-R's configs give the length the model was trained on under a name of their own.
    b = blocks.start(config, dtype, dims, positions=config.opt_int("model_max_length"))
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn = f"{source}.self_attn"

        normed = blocks.layer_norm(b, f"{name}.norm", x, f"{source}.input_layernorm", dims.eps, bias=False)
        norms = None
        if qk_norm:
            q = Part(f"{attn}.q_norm.weight", (dims.heads, dims.head_dim))
            k = Part(f"{attn}.k_norm.weight", (dims.kv_heads, dims.head_dim))
            norms = blocks.HeadNorms([q], [k], "layer")
        y = blocks.self_attention(
            b, name, normed, attn, dims, rope if rotated(layer) else None, qkv_bias=bias, out_bias=bias,
            norms=norms, window=window(layer),
        )  # fmt: skip
        blocks.residual(b, f"{name}.attn", x, y)

        y = blocks.gated_mlp(b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.layer_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps, bias=False)
    tied = config.bool("tie_word_embeddings", True)
    blocks.head(b, last, dims, tied=tied, scale=config.float("logit_scale", 0.0625))
    return b.finish()
