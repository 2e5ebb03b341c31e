"""Decoders whose rows are pooled, and classification heads: against Transformers, alone and in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rvllm.backends.base import StepBatch
from rvllm.backends.cpu.backend import CpuEncoder
from rvllm.config import EngineConfig
from rvllm.errors import ModelError, UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.overrides import read_config
from rvllm.models.pooling import activation_of, labels_of
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.open import open_checkpoint
from support.models import encoders_tiny as encoders

F32 = NDArray[np.float32]
VOCAB, LENGTHS = 120, (1, 140, 17, 33, 17)  # of more than one split, odd, and twice the same
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


def load(path: Path, **settings: Any) -> CpuEncoder:
    checkpoint = open_checkpoint(path)
    config = EngineConfig(device="cpu", threads=2, max_num_seqs=8, max_num_batched_tokens=512, **settings)
    program = build_program(read_config(checkpoint, config), DType.F32)
    return CpuEncoder.load(program, checkpoint, config)


def computed(backend: CpuEncoder, texts: list[list[int]], seconds: dict[int, int] | None = None) -> F32:
    nothing = np.zeros(len(texts), np.int32)
    lengths = np.array([len(t) for t in texts], np.int32)
    tokens = np.concatenate([np.array(t, np.int32) for t in texts])
    batch = StepBatch(
        0, np.arange(len(texts), dtype=np.int32), lengths, nothing, tokens, nothing.astype(np.bool_)
    )
    batch.seconds = seconds or {}
    return backend.embed(batch)


def texts() -> list[list[int]]:
    source = np.random.default_rng(3)
    return [source.integers(4, VOCAB, n).tolist() for n in LENGTHS]


def saved(path: Path, kind: str, config_class: str, model_class: str, **fields: Any) -> Any:
    """A random model of Transformers' class, saved to `path`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    shared = ENCODER if "bert" in kind else DECODER
    config = getattr(transformers, config_class)(**{**shared, **fields})
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25)
    model.save_pretrained(path)
    return model


def theirs(model: Any, ids: list[list[int]], output: str, **more: list[list[int]]) -> F32:
    torch = pytest.importorskip("torch")
    found = []
    with torch.no_grad():
        for i, text in enumerate(ids):
            others = {name: torch.tensor([rows[i]]) for name, rows in more.items()}
            found.append(getattr(model(torch.tensor([text]), **others), output)[0].numpy())
    if output == "last_hidden_state":
        found = [rows[-1] / max(np.linalg.norm(rows[-1]), 1e-12) for rows in found]
    return np.stack(found)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "Gemma2", "Mistral"])
@pytest.mark.parametrize("kernels", ["numpy", "auto"])
def test_last_token_vectors_equal_transformers(kind: str, kernels: str, tmp_path: Path) -> None:
    window = {"sliding_window": 20} if kind in ("Gemma2", "Mistral") else {}
    model = saved(tmp_path, "decoder", f"{kind}Config", f"{kind}Model", **window)
    if kind == "Qwen3":  # as Qwen3-Embedding is published: the generating class, and modules.json
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
        encoders.save_modules(tmp_path, "last", True)
    backend = load(tmp_path, cpu_kernels=kernels)
    ours = computed(backend, texts())
    np.testing.assert_allclose(ours, theirs(model, texts(), "last_hidden_state"), atol=2e-5)
    for text, vector in zip(texts(), ours, strict=True):
        assert np.array_equal(computed(backend, [text])[0], vector), len(text)
    backend.close()


@pytest.mark.oracle
@pytest.mark.parametrize(
    "kind, labels", [("Qwen3", 1), ("Qwen2", 3), ("Llama", 2), ("Gemma", 5), ("Mistral", 2)]
)
def test_decoder_classes_equal_transformers(kind: str, labels: int, tmp_path: Path) -> None:
    model = saved(tmp_path, "decoder", f"{kind}Config", f"{kind}ForSequenceClassification", num_labels=labels)
    backend = load(tmp_path)
    np.testing.assert_allclose(computed(backend, texts()), theirs(model, texts(), "logits"), atol=1e-4)
    backend.close()


@pytest.mark.oracle
@pytest.mark.parametrize("kind, labels", [("Bert", 1), ("Bert", 4), ("Roberta", 2), ("XLMRoberta", 1)])
def test_encoder_classes_equal_transformers(kind: str, labels: int, tmp_path: Path) -> None:
    kinds = 2 if kind == "Bert" else 1
    config, model_class = f"{kind}Config", f"{kind}ForSequenceClassification"
    model = saved(tmp_path, "bert", config, model_class, num_labels=labels, type_vocab_size=kinds)
    backend, ids = load(tmp_path), texts()
    np.testing.assert_allclose(computed(backend, ids), theirs(model, ids, "logits"), atol=1e-4)
    if kinds == 2:  # pairs: the second text's tokens are of another kind
        seconds = {i: len(text) // 3 for i, text in enumerate(ids) if len(text) > 1}
        types = [[int(i in seconds and t >= seconds[i]) for t in range(len(ids[i]))] for i in range(len(ids))]
        wanted = theirs(model, ids, "logits", token_type_ids=types)
        np.testing.assert_allclose(computed(backend, ids, seconds), wanted, atol=1e-4)
        assert np.abs(wanted - theirs(model, ids, "logits")).max() > 1e-2
    backend.close()


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
def test_two_tokens_logits_make_a_score(tied: bool, tmp_path: Path) -> None:
    """Qwen3-Reranker's: softmax over the logits of no and yes, of which the sigmoid is taken of the odds."""
    model = saved(tmp_path, "decoder", "Qwen3Config", "Qwen3ForCausalLM", tie_word_embeddings=tied)
    overrides = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": [7, 19],
                 "is_original_qwen3_reranker": True}  # fmt: skip
    backend = load(tmp_path, hf_overrides=json.dumps(overrides))
    logits = _last_logits(model)
    np.testing.assert_allclose(computed(backend, texts())[:, 0], logits[:, 19] - logits[:, 7], atol=1e-4)
    backend.close()


def _last_logits(model: Any) -> F32:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.stack([model(torch.tensor([text])).logits[0, -1].numpy() for text in texts()])


def config_of(**fields: Any) -> ModelConfig:
    base = {**DECODER, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return ModelConfig(base | fields, "config.json")


def test_what_a_model_is_for() -> None:
    def last(**fields: Any) -> str:
        return build_program(config_of(**fields), DType.F32).ops[-1].kind

    assert last() == "sample" and last(runner="pooling") == "pool"
    sentence = {"pooling": "last", "normalise": True}
    assert last(sentence_transformers=sentence) == "pool"
    assert last(sentence_transformers=sentence, runner="generate") == "sample"
    assert last(architectures=["Qwen3Model"]) == "pool"
    assert last(architectures=["Qwen3ForSequenceClassification"]) == "classify"
    program = build_program(config_of(runner="pooling"), DType.F32)
    assert len(program.caches) == 1, "all layers share the step's keys and values"
    assert not any(w.name == "lm_head" for w in program.weights)
    with pytest.raises(ModelError, match="pooling_type is 'MAX', supported: MEAN, CLS, LAST"):
        build_program(config_of(runner="pooling", pooler_config={"pooling_type": "MAX"}), DType.F32)
    with pytest.raises(ModelError, match="'NopeModel' is not supported"):
        build_program(config_of(architectures=["NopeModel"]), DType.F32)


def test_labels_and_what_makes_them_probabilities() -> None:
    assert labels_of(config_of()) == ("LABEL_0", "LABEL_1") and activation_of(config_of()) == "softmax"
    named = config_of(id2label={"1": "bad", "0": "good", "2": "so so"})
    assert labels_of(named) == ("good", "bad", "so so")
    assert activation_of(config_of(num_labels=1)) == "sigmoid"
    assert activation_of(config_of(problem_type="regression")) == "identity"
    assert activation_of(config_of(problem_type="multi_label_classification")) == "sigmoid"
    named = config_of(
        num_labels=1, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}
    )
    assert activation_of(named) == "identity"
    with pytest.raises(ModelError, match="id2label must name the classes 0 to 1"):
        labels_of(config_of(id2label={"1": "a", "2": "b"}))


def test_overrides_are_objects(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(config_of().values)))
    checkpoint = open_checkpoint(tmp_path)
    read = read_config(checkpoint, EngineConfig(hf_overrides='{"rope_theta": 7, "a": {"b": 1}}'))
    assert read.values["rope_theta"] == 7 and read.values["a"] == {"b": 1} and "runner" not in read.values
    with pytest.raises(UsageError, match="--hf-overrides: expected a JSON object, got '\\[1\\]'"):
        read_config(checkpoint, EngineConfig(hf_overrides="[1]"))


def rows_of(backend: CpuEncoder, texts: list[list[int]]) -> list[F32]:
    lengths = np.array([len(t) for t in texts], np.int32)
    nothing = np.zeros(len(texts), np.int32)
    tokens = np.concatenate([np.array(t, np.int32) for t in texts])
    slots = np.arange(len(texts), dtype=np.int32)
    return backend.embed_tokens(StepBatch(0, slots, lengths, nothing, tokens, nothing.astype(np.bool_)))


def their_rows(model: Any, ids: list[list[int]], output: str) -> list[F32]:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return [getattr(model(torch.tensor([text])), output)[0].numpy() for text in ids]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Bert", "XLMRoberta"])
@pytest.mark.parametrize("kernels", ["numpy", "auto"])
def test_vectors_of_tokens_equal_transformers(kind: str, kernels: str, tmp_path: Path) -> None:
    shape = "bert" if kind in ("Bert", "XLMRoberta") else "decoder"
    model = saved(tmp_path, shape, f"{kind}Config", f"{kind}Model")
    backend = load(tmp_path, cpu_kernels=kernels)
    ours = rows_of(backend, texts())
    for mine, wanted in zip(ours, their_rows(model, texts(), "last_hidden_state"), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-4)
    for text, rows in zip(texts(), ours, strict=True):
        assert np.array_equal(rows_of(backend, [text])[0], rows), len(text)
    backend.close()


@pytest.mark.oracle
@pytest.mark.parametrize("kind, labels", [("Qwen3", 3), ("Llama", 2), ("Bert", 5), ("Roberta", 1)])
def test_classes_of_tokens_equal_transformers(kind: str, labels: int, tmp_path: Path) -> None:
    shape = "bert" if kind in ("Bert", "Roberta") else "decoder"
    model = saved(tmp_path, shape, f"{kind}Config", f"{kind}ForTokenClassification", num_labels=labels)
    backend = load(tmp_path)
    for mine, wanted in zip(rows_of(backend, texts()), their_rows(model, texts(), "logits"), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-4)
    backend.close()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Qwen3", "Bert", "Roberta"])
def test_a_classifier_of_texts_on_single_tokens(kind: str, tmp_path: Path) -> None:
    """As vLLM: BERT's dense layer belongs to the pooling of a text, RoBERTa's to the classes."""
    torch = pytest.importorskip("torch")
    shape = "decoder" if kind == "Qwen3" else "bert"
    model = saved(tmp_path, shape, f"{kind}Config", f"{kind}ForSequenceClassification", num_labels=2)
    backend = load(tmp_path)
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(torch.tensor([texts()[2]])).last_hidden_state
        head = model.score if kind == "Qwen3" else model.classifier
        wanted = head(hidden.swapaxes(0, 1) if kind == "Roberta" else hidden[0]).numpy()
    np.testing.assert_allclose(rows_of(backend, texts()[2:3])[0], wanted, atol=2e-4)
    backend.close()
