"""BertModel (Devlin et al. 2019) as a sentence encoder (Reimers & Gurevych 2019): MiniLM, E5, BGE, GTE.

RobertaModel and XLMRobertaModel are the same network; their positions begin behind the padding token's id.
With ...ForSequenceClassification they are cross-encoders, such as BGE's rerankers, and classifiers.
"""

from __future__ import annotations

from dataclasses import replace

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.pooling import CLASSIFIER, TOKEN_CLASSIFIER, PoolingChoice, labels_of, pooling_of
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.base import Activation
from rvllm.program.ops.dense import Buffer, Embed, Part, Program
from rvllm.program.ops.encoder import AddPositions, Classify, Pool, TextAttention

PREFIXES = ("", "bert.", "roberta.")  # checkpoints of models with a head put the encoder under its name


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a BERT or RoBERTa config with its pooling."""
    hidden, heads = config.int("hidden_size"), config.int("num_attention_heads", high=65536)
    if hidden % heads:
        raise config.fail("num_attention_heads", f"must divide hidden_size {hidden}, got {heads}")
    config.str("position_embedding_type", "absolute", choices=("absolute",))
    if config.bool("is_decoder", False):
        raise config.fail("is_decoder", "is true; only encoders are supported under this architecture")
    vocab, width = config.int("vocab_size"), config.int("intermediate_size")
    places, kinds = config.int("max_position_embeddings"), config.int("type_vocab_size", 2)
    activation = blocks.read_activation(config, "hidden_act", "gelu")
    offset = config.int("pad_token_id", 1, low=0) + 1 if "Roberta" in config.architecture else 0
    if places <= offset:
        raise config.fail("max_position_embeddings", f"must be more than pad_token_id + 1 = {offset}")
    sentence = config.section("sentence_transformers")
    longest = places - offset
    if sentence is not None:
        longest = min(longest, sentence.int("max_seq_length", longest))
    if config.str("runner", "auto") == "generate":
        raise config.fail("architectures", f"{config.architecture} gives vectors and generates no text")

    eps = config.float("layer_norm_eps", 1e-12, low=0.0, high=1.0)
    b = ProgramBuilder(config.architecture, dtype, vocab, longest)
    table = b.table("embed", Part("embeddings.word_embeddings.weight", (vocab, hidden)))
    x = b.emit(Embed(name="embed", table=table, out=b.buffer("x", hidden))).out
    b.emit(
        AddPositions(
            name="positions", x=x, offset=offset,
            positions=b.table("positions", Part("embeddings.position_embeddings.weight", (places, hidden))),
            kinds=b.table("kinds", Part("embeddings.token_type_embeddings.weight", (kinds, hidden))),
        )
    )  # fmt: skip
    blocks.layer_norm(b, "embed_norm", x, "embeddings.LayerNorm", eps, out="x")
    for layer in range(config.int("num_hidden_layers", high=4096)):
        _layer(b, x, layer, heads, width, activation, eps)
    if config.architecture.endswith((CLASSIFIER, TOKEN_CLASSIFIER)):
        _classifier(b, config, x)
    else:
        _pool(b, config, x)
    return b.finish().with_weights(lambda weight: replace(weight, parts=tuple(map(_named, weight.parts))))


def _layer(
    b: ProgramBuilder, x: Buffer, layer: int, heads: int, width: int, activation: Activation, eps: float
) -> None:
    """Attention and a two-layer perceptron, each added to x and normalised behind it."""
    name, source = f"layers.{layer}", f"encoder.layer.{layer}"
    attn, hidden = f"{source}.attention", x.width
    sources = [f"{attn}.self.{which}" for which in ("query", "key", "value")]
    qkv = blocks.linear(b, f"{name}.qkv", x, sources, [hidden] * 3, True)
    mixed = b.emit(
        TextAttention(
            name=f"{name}.attn", qkv=qkv, out=b.buffer(f"{name}.attn.out", hidden),
            heads=heads, head_dim=hidden // heads, scale=(hidden // heads) ** -0.5,
        )
    ).out  # fmt: skip
    y = blocks.linear(b, f"{name}.o", mixed, [f"{attn}.output.dense"], [hidden], True)
    blocks.residual(b, f"{name}.attn", x, y)
    blocks.layer_norm(b, f"{name}.attn_norm", x, f"{attn}.output.LayerNorm", eps, out="x")

    both = (f"{source}.intermediate.dense", f"{source}.output.dense")
    y = blocks.mlp(b, f"{name}.mlp", x, both, width, activation, bias=True)
    blocks.residual(b, f"{name}.mlp", x, y)
    blocks.layer_norm(b, f"{name}.mlp_norm", x, f"{source}.output.LayerNorm", eps, out="x")


def _pool(b: ProgramBuilder, config: ModelConfig, x: Buffer) -> None:
    """One vector a text, as the model's files or the flag say."""
    note = "no modules.json: the mean of all tokens, not normalised, as sentence-transformers does"
    choice = pooling_of(config, PoolingChoice("mean", False, note))
    if choice.note is not None:
        b.note(choice.note)
    out = b.buffer("embeddings", x.width, "samples", DType.F32)
    b.emit(Pool(name="pool", x=x, out=out, how=choice.how, normalise=choice.normalise))


def _classifier(b: ProgramBuilder, config: ModelConfig, x: Buffer) -> None:
    """A dense layer with tanh on the first token's row, and the classes from there.

    BERT calls the two pooler and classifier, RoBERTa classifier.dense and classifier.out_proj. Classes of
    tokens come from their rows at once, in both by a layer called classifier.
    """
    roberta, labels = "Roberta" in config.architecture, len(labels_of(config))
    tokens = config.architecture.endswith(TOKEN_CLASSIFIER)
    dense, final = ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
    final = "classifier" if tokens else final
    row = b.buffer("pooled", x.width, "samples", DType.F32)
    pooled = b.emit(Pool(name="pool", x=x, out=row, how="cls", normalise=False)).out
    b.emit(
        Classify(
            name="classify", x=pooled, out=b.buffer("embeddings", labels, "samples", DType.F32),
            dense=None if tokens else b.matrix("dense", Part(f"{dense}.weight", (x.width, x.width))),
            dense_bias=None if tokens else b.vector("dense.bias", Part(f"{dense}.bias", (x.width,))),
            weight=b.matrix("classes", Part(f"{final}.weight", (labels, x.width))),
            bias=b.vector("classes.bias", Part(f"{final}.bias", (labels,))), dense_pools=not roberta,
            tokens=tokens,
        )
    )  # fmt: skip


def _named(part: Part) -> Part:
    """The part under any of the names it goes by; checkpoints of old say gamma and beta in their norms."""
    old = part.source.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    names = [prefix + name for name in dict.fromkeys((part.source, old)) for prefix in PREFIXES]
    return replace(part, alternatives=tuple(names[1:]))
