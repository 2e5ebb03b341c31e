"""BertModel (Devlin et al. 2019) as a sentence encoder (Reimers & Gurevych 2019): MiniLM, E5, BGE, GTE.

RobertaModel and XLMRobertaModel are the same network; their positions begin behind the padding token's id.
With ...ForSequenceClassification they are cross-encoders, such as BGE's rerankers, and classifiers.
"""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.config import ModelConfig
from rvllm.models.pooling import CLASSIFIER, TOKEN_CLASSIFIER, PoolingChoice, labels_of, pooling_of
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.base import Activation
from rvllm.program.ops.dense import Activate, Add, Buffer, Embed, Linear, Norm, Part, Program
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

    b = Encoder(config, dtype, hidden, vocab, longest)
    table = b.table("embed", part("embeddings.word_embeddings.weight", vocab, hidden))
    x = b.emit(Embed(name="embed", table=table, out=b.buffer("x", hidden))).out
    b.emit(
        AddPositions(
            name="positions", x=x, offset=offset,
            positions=b.table("positions", part("embeddings.position_embeddings.weight", places, hidden)),
            kinds=b.table("kinds", part("embeddings.token_type_embeddings.weight", kinds, hidden)),
        )
    )  # fmt: skip
    b.norm("embed_norm", x, "embeddings.LayerNorm")
    for layer in range(config.int("num_hidden_layers", high=4096)):
        _layer(b, x, layer, heads, width, activation)
    if config.architecture.endswith((CLASSIFIER, TOKEN_CLASSIFIER)):
        _classifier(b, config, x)
        return b.finish()
    choice = pooling_of(
        config,
        PoolingChoice(
            "mean",
            False,
            "no modules.json: the mean of all tokens, not normalised, as sentence-transformers does",
        ),
    )
    if choice.note is not None:
        b.note(choice.note)
    out = b.buffer("embeddings", hidden, "samples", DType.F32)
    b.emit(Pool(name="pool", x=x, out=out, how=choice.how, normalise=choice.normalise))
    return b.finish()


def _layer(b: Encoder, x: Buffer, layer: int, heads: int, width: int, activation: Activation) -> None:
    """Attention and a two-layer perceptron, each added to x and normalised behind it."""
    name, source = f"layers.{layer}", f"encoder.layer.{layer}"

    attn = f"{source}.attention"
    qkv = b.linear(
        f"{name}.qkv", x, [f"{attn}.self.{which}" for which in ("query", "key", "value")], b.hidden
    )
    mixed = b.emit(
        TextAttention(
            name=f"{name}.attn", qkv=qkv, out=b.buffer(f"{name}.attn.out", b.hidden),
            heads=heads, head_dim=b.hidden // heads, scale=(b.hidden // heads) ** -0.5,
        )
    ).out  # fmt: skip
    y = b.linear(f"{name}.o", mixed, [f"{attn}.output.dense"], b.hidden)
    b.emit(Add(name=f"{name}.attn.add", x=x, y=y))
    b.norm(f"{name}.attn_norm", x, f"{attn}.output.LayerNorm")

    up = b.linear(f"{name}.mlp.up", x, [f"{source}.intermediate.dense"], width)
    act = b.buffer(f"{name}.mlp.act.out", width)
    b.emit(Activate(name=f"{name}.mlp.act", x=up, out=act, activation=activation))
    y = b.linear(f"{name}.mlp.down", act, [f"{source}.output.dense"], b.hidden)
    b.emit(Add(name=f"{name}.mlp.add", x=x, y=y))
    b.norm(f"{name}.mlp_norm", x, f"{source}.output.LayerNorm")


def _classifier(b: Encoder, config: ModelConfig, x: Buffer) -> None:
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
            dense=None if tokens else b.matrix("dense", part(f"{dense}.weight", x.width, x.width)),
            dense_bias=None if tokens else b.vector("dense.bias", part(f"{dense}.bias", x.width)),
            weight=b.matrix("classes", part(f"{final}.weight", labels, x.width)),
            bias=b.vector("classes.bias", part(f"{final}.bias", labels)), dense_pools=not roberta,
            tokens=tokens,
        )
    )  # fmt: skip


class Encoder(ProgramBuilder):
    """A builder that knows BERT's names."""

    def __init__(self, config: ModelConfig, dtype: DType, hidden: int, vocab: int, longest: int) -> None:
        super().__init__(config.architecture, dtype, vocab, longest)
        self.hidden = hidden
        self.eps = config.float("layer_norm_eps", 1e-12, low=0.0, high=1.0)

    def linear(self, name: str, x: Buffer, sources: list[str], rows: int) -> Buffer:
        """One product for projections of x that are stacked, `rows` output rows each, with biases."""
        weight = self.matrix(name, *(part(f"{s}.weight", rows, x.width) for s in sources))
        bias = self.vector(f"{name}.bias", *(part(f"{s}.bias", rows) for s in sources))
        out = self.buffer(f"{name}.out", weight.shape[0])
        return self.emit(Linear(name=name, x=x, out=out, weight=weight, bias=bias)).out

    def norm(self, name: str, x: Buffer, source: str) -> None:
        """LayerNorm of x in place; checkpoints of old call its weight and bias gamma and beta."""
        weight = self.vector(name, part(f"{source}.weight", self.hidden, old=f"{source}.gamma"))
        bias = self.vector(f"{name}.bias", part(f"{source}.bias", self.hidden, old=f"{source}.beta"))
        self.emit(Norm(name=name, x=x, out=x, weight=weight, bias=bias, kind_="layer", eps=self.eps))


def part(source: str, *shape: int, old: str | None = None) -> Part:
    """A tensor under any of the names it goes by."""
    names = [prefix + name for name in (source, old) if name for prefix in PREFIXES]
    return Part(names[0], shape, alternatives=tuple(names[1:]))
