"""Decoders that give vectors or classes: the same layers, their last hidden rows pooled or classified.

`embedding` is what sentence-transformers does with Qwen3-Embedding and its kin; `classification` is
Transformers' ...ForSequenceClassification, whose head reads the last token, or ...ForTokenClassification,
whose head reads them all. Attention stays causal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, GatherRows, KVCache, Logits, Norm, Op, Part, Program, Weight
from rvllm.program.ops.encoder import Classify, Pool, Pooling

CLASSIFIER, TOKEN_CLASSIFIER = "ForSequenceClassification", "ForTokenClassification"
POOLINGS = ("mean", "cls", "last")
MAX_LABELS = 1 << 16
Activation = Literal["softmax", "sigmoid", "identity"]


@dataclass(frozen=True)
class PoolingChoice:
    """How a text's rows become one vector. note: what was assumed, None where the model's files say it."""

    how: Pooling
    normalise: bool
    note: str | None = None


def pooling_of(config: ModelConfig, default: PoolingChoice) -> PoolingChoice:
    """The pooling of modules.json with --pooler-config's changes, or `default`. Raises ModelError."""
    found, asked = default, config.section("pooler_config")
    sentence = config.section("sentence_transformers")
    if sentence is not None and sentence.has("pooling"):
        how = cast(Pooling, sentence.str("pooling", choices=POOLINGS))
        found = PoolingChoice(how, sentence.bool("normalise", False))
    if asked is not None:
        how = cast(Pooling, asked.str("pooling_type", found.how.upper()).lower())
        if how not in POOLINGS:
            raise asked.fail("pooling_type", f"is {how.upper()!r}, supported: MEAN, CLS, LAST")
        switch = "use_activation" if asked.has("use_activation") else "normalize"
        found = PoolingChoice(how, asked.bool(switch, found.normalise))
    return found


def labels_of(config: ModelConfig) -> tuple[str, ...]:
    """The names of a classifier's classes, as Transformers reads them from id2label or num_labels."""
    if config.has("classifier_from_token"):
        tokens = config.list("classifier_from_token")
        return ("LABEL_0",) if _contrasts(config) else tuple(map(str, tokens))
    named = config.section("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(config.int("num_labels", 2, high=MAX_LABELS)))
    wanted = [str(i) for i in range(len(named.values))]
    if {str(name) for name in named.values} != set(wanted):
        raise config.fail("id2label", f"must name the classes 0 to {len(wanted) - 1}")
    return tuple(str({str(k): v for k, v in named.values.items()}[i]) for i in wanted)


def activation_of(config: ModelConfig) -> Activation:
    """What makes probabilities of a classifier's numbers, by vLLM's rules.

    `problem_type`, else the function that a cross-encoder's config names, else softmax, or sigmoid for a
    single class.
    """
    problems: dict[str | None, Activation] = {
        "regression": "identity", "single_label_classification": "softmax",
        "multi_label_classification": "sigmoid",
    }  # fmt: skip
    plain: Activation = "softmax" if len(labels_of(config)) > 1 else "sigmoid"
    problem = problems.get(config.opt_str("problem_type"))
    if problem is not None:
        return plain if problem == "softmax" else problem
    named = config.section("sentence_transformers")
    function = config.opt_str("sbert_ce_default_activation_function")
    if named is not None:
        function = named.opt_str("activation_fn") or function
    if function is None:
        return plain
    known: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity", "Softmax": "softmax"}
    if function.rpartition(".")[2] not in known:
        raise config.fail("activation_fn", f"is {function!r}, supported: {', '.join(known)}")
    return known[function.rpartition(".")[2]]


def embedding(program: Program, config: ModelConfig) -> Program:
    """The decoder's program ending in one vector a text: its last token's, of length 1, unless said else."""
    choice = pooling_of(
        config,
        PoolingChoice("last", True, "no modules.json: the last token's row, normalised, as vLLM does"),
    )
    rows, ops = _hidden_rows(program, config)
    out = Buffer("embeddings", "samples", rows.width, DType.F32)
    pool = Pool(name="pool", x=rows, out=out, how=choice.how, normalise=choice.normalise)
    notes = program.notes if choice.note is None else (*program.notes, choice.note)
    return _rebuilt(replace(program, notes=notes), [*ops, pool])


def classification(program: Program, config: ModelConfig) -> Program:
    """The decoder's program ending in its classification head on each text's last token, or on all."""
    rows, ops = _hidden_rows(program, config)
    pooled = Buffer("pooled", "samples", rows.width, DType.F32)
    pool = Pool(name="pool", x=rows, out=pooled, how="last", normalise=False)
    labels = len(labels_of(config))
    contrast = config.has("classifier_from_token") and _contrasts(config)
    if config.has("classifier_from_token"):
        tokens = config.list("classifier_from_token")
        parts = tuple(_token_row(program, config, token) for token in tokens)
    else:
        parts = (Part("score.weight", (labels, rows.width), alternatives=("classifier.weight",)),)
    weight = Weight("score", (len(parts) if len(parts) > 1 else labels, rows.width), parts, "matrix")
    out = Buffer("embeddings", "samples", labels, DType.F32)
    of_tokens = config.architecture.endswith(TOKEN_CLASSIFIER)
    bias = Weight("score.bias", (labels,), (Part("score.bias", (labels,)),), "vector") if of_tokens else None
    head = Classify(
        name="score", x=pooled, out=out, weight=weight, bias=bias, contrast=contrast, tokens=of_tokens
    )
    return _rebuilt(program, [*ops, pool, head])


def _contrasts(config: ModelConfig) -> bool:
    """Whether two tokens' logits make one score, as Qwen3-Reranker's do. Raises ModelError."""
    tokens = config.list("classifier_from_token")
    asked = config.bool("is_original_qwen3_reranker", False)
    if asked and len(tokens) != 2:
        raise config.fail("classifier_from_token", f"must name two tokens (no and yes), got {len(tokens)}")
    return asked


def _token_row(program: Program, config: ModelConfig, token: Any) -> Part:
    """The row of the language-model head that gives one token's logit."""
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < program.vocab_size:
        raise config.fail("classifier_from_token", f"holds {token!r}, which is no token of the vocabulary")
    (logits,) = (op for op in program.ops if isinstance(op, Logits))
    (part,) = logits.weight.parts
    return replace(part, layout="head_rows", heads=1, rows=(token, 1))


def _hidden_rows(program: Program, config: ModelConfig) -> tuple[Buffer, list[Op]]:
    """(normalised hidden rows of all tokens, the ops that make them) of a decoder's program."""
    if program.states:
        raise config.fail("architectures", f"{program.architecture} with recurrent layers cannot be pooled")
    at = next(i for i, op in enumerate(program.ops) if isinstance(op, GatherRows))
    gather, norm = program.ops[at], program.ops[at + 1]
    assert isinstance(gather, GatherRows) and isinstance(norm, Norm), "a decoder ends in a norm of rows"
    rows = replace(norm.out, rows="tokens")
    return rows, [*program.ops[:at], replace(norm, x=gather.x, out=rows)]


def _rebuilt(program: Program, ops: list[Op]) -> Program:
    """The program with these ops and what they use. All layers share one cache: a step leaves nothing.

    Checkpoints saved from the bare model lack the prefix `model.` of their tensors' names.
    """
    caches: dict[str, KVCache] = {}
    weights: dict[str, Weight] = {}

    def of(value: Any) -> Any:
        if isinstance(value, KVCache):
            shared = f"kv.{value.heads}x{value.key_dim}x{value.value_dim}"
            return caches.setdefault(shared, replace(value, name=shared, window=None))
        if isinstance(value, Weight):
            parts = tuple(map(_bare, value.parts))
            return weights.setdefault(value.name, replace(value, parts=parts))
        return value

    made = [op.mapped(of) for op in ops]
    buffers = {b.name: b for op in made for b in (*op.reads, *op.writes)}
    return replace(
        program,
        ops=tuple(made),
        weights=tuple(weights.values()),
        caches=tuple(caches.values()),
        buffers=tuple(buffers.values()),
    )


def _bare(part: Part) -> Part:
    names = (part.source, *part.alternatives)
    bare = tuple(name.removeprefix("model.") for name in names if name.startswith("model."))
    return replace(part, alternatives=(*part.alternatives, *bare))
