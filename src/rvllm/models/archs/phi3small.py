"""Phi3SmallForCausalLM (Abdin et al. 2024): block-sparse attention in most layers, gegelu, muP multipliers.

Transformers has no such model; what it computes is defined by the code published beside its weights.
"""

from __future__ import annotations

from dataclasses import replace

from rvllm.models import blocks
from rvllm.models.config import ModelConfig, token_ids
from rvllm.models.rope import max_positions, read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import BlockSparsity, ClampedGate, Program
from rvllm.program.rope import Rope


def build(config: ModelConfig, dtype: DType) -> Program:
    config.str("hidden_act", "gegelu", choices=("gegelu",))
    dims = read_dims(config)
    rope = read_small_rope(config, dims.head_dim)
    scale = dims.head_dim**-0.5
    if config.bool("mup_use_scaling", True):
        scale = config.float("mup_attn_multiplier", 1.0, low=1e-6) / dims.head_dim
    limit = config.opt_float("gegelu_limit", 20.0, low=0.0)
    every = config.int("dense_attention_every_n_layers", 2, low=0)
    sparsity = read_sparsity(config, dims.heads)

    b = blocks.start(config, dtype, dims, positions=max_positions(config, 8192))
    x = blocks.embed(b, dims, scale=config.opt_float("mup_embedding_multiplier", 10.0, low=0.0) or 1.0)
    for layer in range(dims.layers):
        name, source = f"layers.{layer}", f"model.layers.{layer}"
        attn, mlp = f"{source}.self_attn", f"{source}.mlp"
        sparse = None if every and (layer + 1) % every == 0 else sparsity

        normed = blocks.layer_norm(b, f"{name}.attn_norm", x, f"{source}.input_layernorm", dims.eps)
        fused, qkv_rows = f"{attn}.query_key_value", (dims.heads + 2 * dims.kv_heads) * dims.head_dim
        qkv = blocks.linear(
            b, f"{name}.qkv", normed, [fused], [qkv_rows], True, "grouped_qkv", dims.kv_heads, dims.head_dim
        )
        mixed = blocks.attention(b, name, qkv, dims, rope, scale=scale, sparsity=sparse)
        y = blocks.linear(b, f"{name}.o", mixed, [f"{attn}.dense"], [dims.hidden], True)
        blocks.residual(b, f"{name}.attn", x, y)

        normed = blocks.layer_norm(b, f"{name}.mlp_norm", x, f"{source}.post_attention_layernorm", dims.eps)
        rows = [2 * dims.intermediate]
        both = blocks.linear(b, f"{name}.mlp.gate_up", normed, [f"{mlp}.up_proj"], rows, True, "pairs")
        act = b.buffer(f"{name}.mlp.act.out", dims.intermediate)
        b.emit(ClampedGate(name=f"{name}.mlp.act", x=both, out=act, limit=limit))
        y = blocks.linear(b, f"{name}.mlp.down", act, [f"{mlp}.down_proj"], [dims.hidden], True)
        blocks.residual(b, f"{name}.mlp", x, y)

    last = blocks.layer_norm(b, "final_norm", blocks.select(b, x), "model.final_layernorm", dims.eps)
    blocks.head(
        b, last, dims,
        tied=config.bool("tie_word_embeddings", True),
        scale=1.0 / (config.opt_float("mup_width_multiplier", 8.0, low=0.0) or 1.0),
        hidden=read_hidden(config, dims.vocab),
    )  # fmt: skip
    return b.finish()


def read_dims(config: ModelConfig) -> blocks.Dims:
    """The dimensions. The MLP's width is given, or derived as the published code does."""
    if config.has("ff_intermediate_size"):
        width = config.int("ff_intermediate_size")
    else:
        width = config.int("ff_dim_multiplier") * (config.int("hidden_size") // 3) * 2
        if config.bool("gegelu_pad_to_256", True):
            width = -(-width // 256) * 256
    known = ModelConfig({**config.values, "intermediate_size": width}, config.origin)
    return blocks.Dims.read(known, eps="layer_norm_epsilon", default_eps=1e-5)


def read_sparsity(config: ModelConfig, heads: int) -> BlockSparsity:
    """Local blocks and vertical stripes; unless all heads share them, each head's stripes are shifted."""
    stride = config.int("blocksparse_vert_stride", 8)
    return BlockSparsity(
        size=config.int("blocksparse_block_size", 64),
        local=config.int("blocksparse_num_local_blocks", 16),
        stride=stride,
        head_step=0 if config.bool("blocksparse_homo_head_pattern", False) else max(1, stride // heads),
    )


def read_small_rope(config: ModelConfig, head_dim: int) -> Rope:
    """`rope_position_scale` divides positions; the 128k models use LongRoPE with multipliers of their own."""
    rope = read_rope(config, head_dim, theta_name="rope_embedding_base", default_theta=1_000_000.0)
    section = config.section("rope_scaling")
    if section is None:
        factor = config.float("rope_position_scale", 1.0, low=1e-6)
        return rope if factor == 1.0 else replace(rope, kind="linear", factor=factor)
    if rope.kind != "longrope":
        raise section.fail("type", f"is {rope.kind!r}, supported: longrope, su")
    # Zero or less stands for the derived multiplier, as does an absent one.
    long, short = section.float("long_mscale", 0.0), section.float("short_mscale", 0.0)
    return replace(
        rope,
        attention_factor=long if long > 0 else rope.attention_factor,
        short_attention_factor=short if short > 0 else 1.0,
    )


def read_hidden(config: ModelConfig, vocab: int) -> tuple[int, ...]:
    """Places of the vocabulary that only pad it."""
    found = token_ids(config, "dummy_token_indices")
    if any(token >= vocab for token in found):
        raise config.fail("dummy_token_indices", f"holds {max(found)}, the vocabulary has {vocab} tokens")
    return found
