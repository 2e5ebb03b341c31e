"""LlamaForCausalLM (Touvron et al. 2023): Llama 1-3, CodeLlama, Vicuna, SmolLM2 and their kin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activation, Buffer, Program
from rvllm.program.rope import Rope


@dataclass(frozen=True)
class Scales:
    """Constants that some relatives multiply with; None is 1 / sqrt(head_dim)."""

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Layer:
    """Where a layer stands: its number, the name its ops begin with, and its name in the checkpoint."""

    number: int
    name: str
    source: str


Attend = Callable[[ProgramBuilder, Layer, Buffer], Buffer]
Feed = Callable[[ProgramBuilder, Layer, Buffer], Iterable[tuple[str, Buffer]]]
"""What stands behind a layer's second norm: outputs that are added to the stream, each with its name."""


def build(config: ModelConfig, dtype: DType) -> Program:
    return decoder(config, dtype, mlp_bias=config.bool("mlp_bias", False))


def decoder(
    config: ModelConfig,
    dtype: DType,
    dims: blocks.Dims | None = None,
    *,
    qkv_bias: bool | None = None,
    mlp_bias: bool = False,
    fused: bool = False,
    head_norms: bool = False,
    activation: Activation | None = None,
    rope: Rope | None = None,
    window: Callable[[int], int | None] = lambda layer: None,
    rotated: Callable[[int], bool] = lambda layer: True,
    tied: bool = False,
    norm_add: float = 0.0,
    scales: Scales = Scales(),
    feed: Feed | None = None,
) -> Program:
    """Pre-norm decoder with SwiGLU; its relatives differ in biases, scales, and each layer's window and rope.

    qkv_bias: whether queries, keys and values have biases, and the output none; None: `attention_bias` says
    it of all four. fused: the projections of attention and of the MLP's first half are one tensor each.
    head_norms: query and key heads are normalised. tied: whether the head is the embedding when the config
    does not say. feed: what stands in place of the MLP.
    """
    known = dims or blocks.Dims.read(config)
    out_bias = qkv_bias is None and config.bool("attention_bias", False)
    act = activation or blocks.read_activation(config, "hidden_act")
    rope = rope or read_rope(config, known.head_dim)

    def attend(b: ProgramBuilder, at: Layer, x: Buffer) -> Buffer:
        source = f"{at.source}.self_attn"
        return blocks.self_attention(
            b, at.name, x, source, known, rope if rotated(at.number) else None,
            qkv_bias=bool(qkv_bias) or out_bias, out_bias=out_bias, fused="qkv_proj" if fused else None,
            norms=blocks.HeadNorms.shared(source, known) if head_norms else None,
            window=window(at.number), scale=scales.attention,
        )  # fmt: skip

    def mlp(b: ProgramBuilder, at: Layer, x: Buffer) -> Iterable[tuple[str, Buffer]]:
        name, halves = f"{at.name}.mlp", "gate_up_proj" if fused else None
        yield (
            name,
            blocks.gated_mlp(
                b, name, x, f"{at.source}.mlp", known.intermediate, act, bias=mlp_bias, fused=halves
            ),
        )

    return pre_norm(config, dtype, known, attend, feed or mlp, tied=tied, norm_add=norm_add, scales=scales)


def pre_norm(
    config: ModelConfig,
    dtype: DType,
    dims: blocks.Dims,
    attend: Attend,
    feed: Feed,
    *,
    tied: bool = False,
    norm_add: float = 0.0,
    scales: Scales = Scales(),
) -> Program:
    """Layers of x + attend(norm(x)), x + feed(norm(x)) with RMSNorms whose weights lack `norm_add`."""
    b = blocks.start(config, dtype, dims)
    x = blocks.embed(b, dims, scale=scales.embedding)
    for number in range(dims.layers):
        at = Layer(number, f"layers.{number}", f"model.layers.{number}")

        normed = blocks.rms_norm(
            b, f"{at.name}.attn_norm", x, f"{at.source}.input_layernorm", dims.eps, add=norm_add
        )
        blocks.residual(b, f"{at.name}.attn", x, attend(b, at, normed), scales.residual)

        normed = blocks.rms_norm(
            b, f"{at.name}.mlp_norm", x, f"{at.source}.post_attention_layernorm", dims.eps, add=norm_add
        )
        for name, y in feed(b, at, normed):
            blocks.residual(b, name, x, y, scales.residual)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "model.norm", dims.eps, add=norm_add)
    blocks.head(b, last, dims, tied=config.bool("tie_word_embeddings", tied), scale=scales.logits)
    return b.finish()
