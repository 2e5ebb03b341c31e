"""Multi-head latent attention (DeepSeek-AI 2024, section 2.1), with its projections absorbed.

Keys and values of all heads are made from one latent a token, which is what the cache holds, beside the
one key that carries the position. W_uk and W_uv, which would make keys and values from it, are applied to
queries and results instead; the products are the same, and no key or value of a head ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope, rope_kind, rope_section, yarn_mscale
from rvllm.program.builder import ProgramBuilder
from rvllm.program.ops.dense import (
    Buffer,
    HeadLinear,
    KVCache,
    LatentAttention,
    LatentRopeKV,
    Norm,
    Part,
    Weight,
)
from rvllm.program.rope import Rope


@dataclass(frozen=True)
class Latent:
    """Dimensions of latent attention.

    plain, rotated: elements of a head's query and key without and with position; value: of its value.
    rank: of the latent. query_rank: of the queries' own latent, None where they are projected directly.
    """

    hidden: int
    heads: int
    plain: int
    rotated: int
    value: int
    rank: int
    query_rank: int | None
    eps: float
    rope: Rope
    scale: float

    @staticmethod
    def read(config: ModelConfig) -> Latent:
        """Reads them under DeepSeek's names. Raises ModelError.

        With YaRN, `mscale_all_dim` raises the temperature of the whole score, queries and keys both.
        """
        plain = config.int("qk_nope_head_dim", high=65536)
        rotated = config.int("qk_rope_head_dim", high=65536)
        if rotated % 2:
            raise config.fail("qk_rope_head_dim", f"must be even, got {rotated}")
        scale = (plain + rotated) ** -0.5
        section = rope_section(config)
        if section is not None and rope_kind(section) != "default":
            overall = section.float("mscale_all_dim", 0.0)
            if overall:
                scale *= yarn_mscale(section.float("factor", low=1.0, high=1e6), overall) ** 2
        return Latent(
            hidden=config.int("hidden_size"),
            heads=config.int("num_attention_heads", high=65536),
            plain=plain,
            rotated=rotated,
            value=config.int("v_head_dim", high=65536),
            rank=config.int("kv_lora_rank", high=1 << 20),
            query_rank=config.opt_int("q_lora_rank"),
            eps=1e-6,  # of the latents' norms; the published code never passes them another
            rope=read_rope(config, rotated, interleaved=config.bool("rope_interleave", True)),
            scale=scale,
        )


def latent_attention(
    b: ProgramBuilder, name: str, x: Buffer, source: str, dims: Latent, *, bias: bool
) -> Buffer:
    """Latents, absorbed queries, attention, output projection; x [T, hidden] → [T, hidden]."""
    q = queries(b, name, x, source, dims, bias=bias)
    kv_rows = dims.rank + dims.rotated
    kv = blocks.linear(b, f"{name}.kv_a", x, [f"{source}.kv_a_proj_with_mqa"], [kv_rows], bias)
    weight = b.vector(f"{name}.kv_norm", Part(f"{source}.kv_a_layernorm.weight", (dims.rank,)))
    b.emit(Norm(name=f"{name}.kv_norm", x=kv, out=kv, weight=weight, eps=dims.eps, width=dims.rank))

    cache = b.cache(KVCache(f"{name}.kv", 1, kv_rows, 0))
    b.emit(
        LatentRopeKV(
            name=f"{name}.rope_kv", q=q, kv=kv, cache=cache, heads=dims.heads,
            head_dim=dims.plain + dims.rotated, rope=dims.rope,
        )
    )  # fmt: skip
    into, out_of = absorbed(b, name, source, dims)
    absorbed_q = b.buffer(f"{name}.absorb.out", dims.heads * kv_rows)
    b.emit(HeadLinear(name=f"{name}.absorb", x=q, out=absorbed_q, weight=into, tail=dims.rotated))
    mixed = b.emit(
        LatentAttention(
            name=f"{name}.attn", q=absorbed_q, out=b.buffer(f"{name}.attn.out", dims.heads * dims.rank),
            cache=cache, heads=dims.heads, rank=dims.rank, scale=dims.scale,
        )
    ).out  # fmt: skip
    values = b.buffer(f"{name}.values.out", dims.heads * dims.value)
    b.emit(HeadLinear(name=f"{name}.values", x=mixed, out=values, weight=out_of))
    return blocks.linear(b, f"{name}.o", values, [f"{source}.o_proj"], [dims.hidden], bias)


def queries(b: ProgramBuilder, name: str, x: Buffer, source: str, dims: Latent, *, bias: bool) -> Buffer:
    """[T, heads * (plain + rotated)], through a latent of their own where the model has one."""
    rows = dims.heads * (dims.plain + dims.rotated)
    if dims.query_rank is None:
        return blocks.linear(b, f"{name}.q", x, [f"{source}.q_proj"], [rows], False)
    low = blocks.linear(b, f"{name}.q_a", x, [f"{source}.q_a_proj"], [dims.query_rank], bias)
    normed = blocks.rms_norm(b, f"{name}.q_norm", low, f"{source}.q_a_layernorm", dims.eps)
    return blocks.linear(b, f"{name}.q_b", normed, [f"{source}.q_b_proj"], [rows], False)


def absorbed(b: ProgramBuilder, name: str, source: str, dims: Latent) -> tuple[Weight, Weight]:
    """W_uk transposed [heads, rank, plain] and W_uv [heads, value, rank], both parts of kv_b_proj.

    kv_b_proj has rows [head][plain | value]; llama.cpp's files hold the two already apart.
    """
    each = dims.plain + dims.value
    kv_b, shape = f"{source}.kv_b_proj.weight", (dims.heads * each, dims.rank)
    keys = Part(
        kv_b, shape, "head_columns", dims.heads, rows=(0, dims.plain), prepared=f"{source}.k_b_proj.weight"
    )
    values = Part(
        kv_b, shape, "head_rows", dims.heads, rows=(dims.plain, dims.value),
        prepared=f"{source}.v_b_proj.weight",
    )  # fmt: skip
    return (
        b.weight(Weight(f"{name}.absorb", (dims.heads, dims.rank, dims.plain), (keys,), "stack")),
        b.weight(Weight(f"{name}.values", (dims.heads, dims.value, dims.rank), (values,), "stack")),
    )
