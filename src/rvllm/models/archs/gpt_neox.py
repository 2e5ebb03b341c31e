"""GPTNeoXForCausalLM (Black et al. 2022): GPT-NeoX-20B, Pythia; biases everywhere, two LayerNorms a block."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope, rotated_dim
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    dims = blocks.Dims.read(config, eps="layer_norm_eps", default_eps=1e-5)
    activation = blocks.read_activation(config, "hidden_act", "gelu")
    bias = config.bool("attention_bias", True)
    parallel = config.bool("use_parallel_residual", True)
    rotated = rotated_dim(config, dims.head_dim, default=0.25, name="rotary_pct")
    rope = read_rope(config, rotated, theta_name="rotary_emb_base")

    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims, "gpt_neox.embed_in.weight")
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"gpt_neox.layers.{layer}"
        mlp = (f"{source}.mlp.dense_h_to_4h", f"{source}.mlp.dense_4h_to_h")

        for_attention = blocks.layer_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        second = f"{source}.post_attention_layernorm"
        if parallel:  # the MLP's norm reads the stream as attention's did
            for_mlp = blocks.layer_norm(b, f"{name}.mlp_norm", x, second, dims.eps)

        fused, rows = f"{source}.attention.query_key_value", 3 * dims.heads * dims.head_dim
        qkv = blocks.linear(b, f"{name}.qkv", for_attention, [fused], [rows], bias, "head_qkv", dims.heads)
        y = blocks.attention(b, name, qkv, dims, rope)
        y = blocks.linear(b, f"{name}.o", y, [f"{source}.attention.dense"], [dims.hidden], bias)
        blocks.residual(b, f"{name}.attn", x, y)

        if not parallel:
            for_mlp = blocks.layer_norm(b, f"{name}.mlp_norm", x, second, dims.eps)
        y = blocks.mlp(b, f"{name}.mlp", for_mlp, mlp, dims.intermediate, activation, bias=True)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.layer_norm(b, "final_norm", blocks.select(b, x), "gpt_neox.final_layer_norm", dims.eps)
    blocks.head(
        b, last, dims,
        tied=config.bool("tie_word_embeddings", False),
        source="embed_out.weight",
        embed_source="gpt_neox.embed_in.weight",
    )  # fmt: skip
    return b.finish()
