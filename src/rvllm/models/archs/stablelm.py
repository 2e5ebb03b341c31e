"""StableLmForCausalLM: StableLM-3B, StableLM-2 (Bellagente et al. 2024); LayerNorm, partial rope, SwiGLU."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope, rotated_dim
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program


def build(config: ModelConfig, dtype: DType) -> Program:
    dims = blocks.Dims.read(config, eps="layer_norm_eps", default_eps=1e-5)
    activation = blocks.read_activation(config, "hidden_act")
    qkv_bias = config.bool("use_qkv_bias", False)
    qk_norm = config.bool("qk_layernorm", False)
    parallel = config.bool("use_parallel_residual", False)
    rope = read_rope(config, rotated_dim(config, dims.head_dim, default=0.25))

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn = f"{source}.self_attn"

        normed = blocks.layer_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        norms = None
        if qk_norm:
            q = per_head(f"{attn}.q_layernorm", dims.heads, dims.head_dim)
            k = per_head(f"{attn}.k_layernorm", dims.kv_heads, dims.head_dim)
            norms = blocks.HeadNorms(q, k, "layer")
        y = blocks.self_attention(b, name, normed, attn, dims, rope, qkv_bias=qkv_bias, norms=norms)
        blocks.residual(b, f"{name}.attn", x, y)

        if not parallel:  # in parallel, the MLP reads what attention read
            normed = blocks.layer_norm(
                b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps
            )  # fmt: skip
        y = blocks.gated_mlp(b, f"{name}.mlp", normed, f"{source}.mlp", dims.intermediate, activation)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.layer_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", False))
    return b.finish()


def per_head(source: str, heads: int, head_dim: int) -> list[Part]:
    """A norm weight for every head, each a tensor of its own."""
    return [Part(f"{source}.norms.{head}.weight", (head_dim,)) for head in range(heads)]
