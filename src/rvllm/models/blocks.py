"""Building blocks shared by the architecture files: each emits a few ops and names the weights they take.

Op and weight names start with the layer (`layers.3.qkv`); checkpoint names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rvllm.models.config import ModelConfig
from rvllm.models.rope import max_positions
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.base import Layout
from rvllm.program.ops.dense import (
    Activate,
    Activation,
    Add,
    Attention,
    BlockSparseAttention,
    BlockSparsity,
    Buffer,
    Embed,
    GatedActivation,
    GatherRows,
    HideTokens,
    KVCache,
    Linear,
    Logits,
    Norm,
    Part,
    RopeKV,
    Sample,
    Weight,
)
from rvllm.program.rope import Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


# What Transformers' classes take for an absent num_key_value_heads; the others, and null: as many as heads.
KV_HEADS = {
    "mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4, "gemma": 16, "gemma2": 4,
    "gemma3_text": 4, "smollm3": 4, "stablelm": 32, "deepseek_v3": 128,
}  # fmt: skip


def _default_kv_heads(config: ModelConfig, heads: int) -> int:
    """Where the class's own default does not divide the heads, the config cannot mean it."""
    default = heads
    if "num_key_value_heads" not in config.values:
        default = KV_HEADS.get(str(config.values.get("model_type")), heads)
    return default if default <= heads and heads % default == 0 else heads


@dataclass(frozen=True)
class Dims:
    """The dimensions nearly every decoder has."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float

    @staticmethod
    def read(
        config: ModelConfig, eps: str = "rms_norm_eps", head_dim: int | None = None, default_eps: float = 1e-6
    ) -> Dims:
        """Reads them under Llama's names; `eps` names the norm's epsilon. Raises ModelError.

        head_dim, default_eps: what they are when the config does not say; head_dim None is hidden / heads.
        """
        hidden = config.int("hidden_size")
        heads = config.int("num_attention_heads", high=65536)
        kv_heads = config.int("num_key_value_heads", _default_kv_heads(config, heads), high=heads)
        if heads % kv_heads:
            raise config.fail(
                "num_key_value_heads", f"must divide num_attention_heads {heads}, got {kv_heads}"
            )
        if not config.has("head_dim") and head_dim is None and hidden % heads:
            raise config.fail("num_attention_heads", f"must divide hidden_size {hidden}, got {heads}")
        return Dims(
            hidden=hidden,
            intermediate=config.int("intermediate_size"),
            layers=config.int("num_hidden_layers", high=4096),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.int("head_dim", head_dim or hidden // heads, high=65536),
            vocab=config.int("vocab_size"),
            eps=config.float(eps, default_eps, low=0.0, high=1.0),
        )


def start(
    config: ModelConfig,
    dtype: DType,
    dims: Dims,
    default_positions: int | None = None,
    *,
    positions: int | None = None,
) -> ProgramBuilder:
    """A builder for this architecture; `positions` overrides the longest sequence."""
    longest = max_positions(config, default_positions) if positions is None else positions
    return ProgramBuilder(config.architecture, dtype, dims.vocab, longest)


def layer_types(config: ModelConfig, layers: int) -> list[bool] | None:
    """Which layers attend within the window, by `layer_types`; None when the config has no such list."""
    if not config.has("layer_types"):
        return None
    kinds = config.list("layer_types", length=layers)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.fail("layer_types", f"holds {kind!r}, supported: full_attention, sliding_attention")
    return [kind == "sliding_attention" for kind in kinds]


def sliding_layers(config: ModelConfig, layers: int, pattern: int) -> list[bool]:
    """Which layers attend within the window: by `layer_types`, or of old all but each `pattern`-th."""
    every = config.int("sliding_window_pattern", pattern)
    return layer_types(config, layers) or [(layer + 1) % every != 0 for layer in range(layers)]


def read_activation(config: ModelConfig, name: str, default: str = "silu") -> Activation:
    """An activation field in the program's spelling."""
    return ACTIVATIONS[config.str(name, default, choices=tuple(ACTIVATIONS))]


def embed(
    b: ProgramBuilder, dims: Dims, source: str = "model.embed_tokens.weight", scale: float = 1.0
) -> Buffer:
    """Token embeddings into the residual stream `x`."""
    table = b.table("embed", Part(source, (dims.vocab, dims.hidden)))
    return b.emit(Embed(name="embed", table=table, out=b.buffer("x", dims.hidden), scale=scale)).out


def rms_norm(b: ProgramBuilder, name: str, x: Buffer, source: str, eps: float, *, add: float = 0.0) -> Buffer:
    """RMSNorm with the weight `source`.weight (+ `add`)."""
    weight = b.vector(name, Part(f"{source}.weight", (x.width,), add=add))
    return b.emit(Norm(name=name, x=x, out=b.buffer(name, x.width, x.rows), weight=weight, eps=eps)).out


def layer_norm(
    b: ProgramBuilder, name: str, x: Buffer, source: str, eps: float, *, bias: bool = True, out: str = ""
) -> Buffer:
    """LayerNorm with `source`.weight and, if it has one, `source`.bias into the buffer `out` (or `name`)."""
    weight = b.vector(name, Part(f"{source}.weight", (x.width,)))
    shift = b.vector(f"{name}.bias", Part(f"{source}.bias", (x.width,))) if bias else None
    normed = b.buffer(out or name, x.width, x.rows)
    return b.emit(Norm(name=name, x=x, out=normed, weight=weight, bias=shift, kind_="layer", eps=eps)).out


def linear(
    b: ProgramBuilder, name: str, x: Buffer, sources: Sequence[str], rows: Sequence[int], bias: bool,
    layout: Layout = "plain", heads: int = 0, head_dim: int = 0,
) -> Buffer:  # fmt: skip
    """One matrix product for several projections of x, stacked: `sources`[i] has `rows`[i] output rows.

    layout, heads, head_dim: how rows are rearranged, see Part.
    """
    whole = list(zip(sources, rows, strict=True))
    weight = b.matrix(name, *(Part(f"{s}.weight", (n, x.width), layout, heads, head_dim) for s, n in whole))
    shift: Weight | None = None
    if bias:
        shift = b.vector(
            f"{name}.bias", *(Part(f"{s}.bias", (n,), layout, heads, head_dim) for s, n in whole)
        )
    out = b.buffer(f"{name}.out", weight.shape[0], x.rows)
    return b.emit(Linear(name=name, x=x, out=out, weight=weight, bias=shift)).out


def attention(
    b: ProgramBuilder,
    name: str,
    qkv: Buffer,
    dims: Dims,
    rope: Rope | None,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sparsity: BlockSparsity | None = None,
) -> Buffer:
    """Rotates, caches and attends, over some blocks of keys only if there is a sparsity.

    Fused qkv rows in, [T, heads * head_dim] out.
    """
    cache = b.cache(KVCache(f"{name}.kv", dims.kv_heads, dims.head_dim, dims.head_dim, window))
    shape = {"heads": dims.heads, "kv_heads": dims.kv_heads, "head_dim": dims.head_dim}
    b.emit(RopeKV(name=f"{name}.rope_kv", qkv=qkv, cache=cache, rope=rope, **shape))
    out, name = b.buffer(f"{name}.attn.out", dims.heads * dims.head_dim), f"{name}.attn"
    scale = dims.head_dim**-0.5 if scale is None else scale
    if sparsity is not None:
        return b.emit(
            BlockSparseAttention(
                name=name, qkv=qkv, out=out, cache=cache, scale=scale, sparsity=sparsity, **shape
            )
        ).out
    return b.emit(
        Attention(
            name=name, qkv=qkv, out=out, cache=cache, scale=scale, window=window, soft_cap=soft_cap, **shape
        )
    ).out


def self_attention(
    b: ProgramBuilder,
    name: str,
    x: Buffer,
    source: str,
    dims: Dims,
    rope: Rope | None,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    fused: str | None = None,
    norms: HeadNorms | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Buffer:
    """q, k and v projections as one product, rope, attention, output projection, under Llama's names.

    fused: the projections' name if they are one tensor.
    """
    width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    sources, rows = [f"{source}.{p}_proj" for p in "qkv"], [width, kv_width, kv_width]
    if fused is not None:
        sources, rows = [f"{source}.{fused}"], [sum(rows)]
    qkv = linear(b, f"{name}.qkv", x, sources, rows, qkv_bias)
    if norms is not None:
        _head_norms(b, name, qkv, dims, norms)
    mixed = attention(b, name, qkv, dims, rope, window=window, scale=scale, soft_cap=soft_cap)
    return linear(b, f"{name}.o", mixed, [f"{source}.o_proj"], [dims.hidden], out_bias)


@dataclass(frozen=True)
class HeadNorms:
    """Weights of the norms of query and key heads, each [head_dim] for all heads or one row a head."""

    query: Sequence[Part]
    key: Sequence[Part]
    kind: Literal["rms", "layer"] = "rms"

    @staticmethod
    def shared(source: str, dims: Dims, add: float = 0.0) -> HeadNorms:
        """RMSNorms under Qwen's and Gemma's names, one weight (+ `add`) for all heads."""
        q, k = (Part(f"{source}.{which}_norm.weight", (dims.head_dim,), add=add) for which in "qk")
        return HeadNorms([q], [k])


def _head_norms(b: ProgramBuilder, name: str, qkv: Buffer, dims: Dims, norms: HeadNorms) -> None:
    """Normalises each query and each key head inside a fused qkv row, in place."""
    start = 0
    for which, heads, parts in (("q", dims.heads, norms.query), ("k", dims.kv_heads, norms.key)):
        weight, width = b.vector(f"{name}.{which}_norm", *parts), heads * dims.head_dim
        b.emit(
            Norm(
                name=f"{name}.{which}_norm", x=qkv, out=qkv, weight=weight, kind_=norms.kind, eps=dims.eps,
                group=dims.head_dim, start=start, width=width,
            )
        )  # fmt: skip
        start += width


def gated_mlp(
    b: ProgramBuilder,
    name: str,
    x: Buffer,
    source: str,
    width: int,
    activation: Activation,
    *,
    bias: bool = False,
    fused: str | None = None,
) -> Buffer:
    """down(act(gate(x)) * up(x)), gate and up as one product; `fused` names them if they are one tensor."""
    halves = [f"{source}.gate_proj", f"{source}.up_proj"]
    sources, rows = (halves, [width, width]) if fused is None else ([f"{source}.{fused}"], [2 * width])
    both = linear(b, f"{name}.gate_up", x, sources, rows, bias)
    act = b.buffer(f"{name}.act.out", width, x.rows)
    b.emit(GatedActivation(name=f"{name}.act", x=both, out=act, activation=activation))
    return linear(b, f"{name}.down", act, [f"{source}.down_proj"], [x.width], bias)


def mlp(
    b: ProgramBuilder,
    name: str,
    x: Buffer,
    sources: tuple[str, str],
    width: int,
    activation: Activation,
    *,
    bias: bool,
) -> Buffer:
    """second(act(first(x))) with the two named projections."""
    up = linear(b, f"{name}.up", x, [sources[0]], [width], bias)
    act = b.buffer(f"{name}.act.out", width, x.rows)
    b.emit(Activate(name=f"{name}.act", x=up, out=act, activation=activation))
    return linear(b, f"{name}.down", act, [sources[1]], [x.width], bias)


def residual(b: ProgramBuilder, name: str, x: Buffer, y: Buffer, scale: float = 1.0) -> None:
    """x += y * scale."""
    b.emit(Add(name=f"{name}.add", x=x, y=y, scale=scale))


def select(b: ProgramBuilder, x: Buffer) -> Buffer:
    """The rows whose logits are wanted; everything after it works on those alone."""
    return b.emit(GatherRows(name="last", x=x, out=b.buffer("last", x.width, "samples"))).out


def head(
    b: ProgramBuilder,
    x: Buffer,
    dims: Dims,
    *,
    tied: bool,
    source: str = "lm_head.weight",
    embed_source: str = "model.embed_tokens.weight",
    scale: float = 1.0,
    soft_cap: float | None = None,
    hidden: tuple[int, ...] = (),
) -> None:
    """Logits from normalised rows, and the draw. A tied head is the embedding table itself.

    hidden: tokens of the vocabulary that stand for nothing and are never drawn.
    """
    shape = (dims.vocab, dims.hidden)
    weight = b.table("embed", Part(embed_source, shape)) if tied else b.matrix("lm_head", Part(source, shape))
    out = b.buffer("logits", dims.vocab, "samples", DType.F32)
    b.emit(Logits(name="lm_head", x=x, out=out, weight=weight, scale=scale, soft_cap=soft_cap))
    if hidden:
        b.emit(HideTokens(name="hide_tokens", logits=out, tokens=hidden))
    b.emit(Sample(name="sample", logits=out))
