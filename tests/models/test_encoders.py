"""Sentence encoders: against Transformers and sentence-transformers' arithmetic, alone and together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rvllm import LLM, PoolingParams
from rvllm.cli.main import main
from rvllm.errors import ModelError, UsageError
from support.models import archs_tiny as tiny
from support.models import encoders_tiny as encoders
from support.models.fetched import model_path
from support.models.gguf_frame import write_file
from support.models.oracle_encoders import oracle

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "encoders"


@pytest.mark.oracle
@pytest.mark.parametrize("name", encoders.CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    case = encoders.CASES[name]
    path = encoders.save(tmp_path, name)
    texts = encoders.token_texts(name)
    backend = encoders.load(path)
    ours = encoders.embed(backend, texts)
    backend.close()
    theirs = oracle(path, texts, case["how"], case["normalise"])
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", encoders.CASES)
def test_equals_golden_file_alone_and_together(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    config = encoders.CASES[name]["config"]
    assert tiny.digest(tiny.random_tensors(name, config)) == golden["weights_sha256"], "other weights"
    texts = encoders.token_texts(name)
    backend = encoders.load(encoders.save(tmp_path, name))
    together = encoders.embed(backend, texts)
    np.testing.assert_allclose(together, np.array(golden["vectors"], np.float32), atol=1e-5, rtol=0)
    for text, vector in zip(texts, together, strict=True):
        assert np.array_equal(encoders.embed(backend, [text])[0], vector), len(text)
    one_thread = encoders.load(tmp_path, threads=1)
    assert np.array_equal(encoders.embed(one_thread, texts[::-1]), together[::-1])
    backend.close()
    one_thread.close()


@pytest.fixture(scope="module")
def minilm() -> LLM:
    return LLM(str(model_path("minilm-l6-v2")), device="cpu")


@pytest.mark.models
def test_minilm_equals_sentence_transformers_on_fifty_texts(minilm: LLM) -> None:
    texts, golden = encoders.sentences(), np.load(GOLDEN / "minilm.npz")
    found = minilm.embed(texts, truncate_prompt_tokens=-1, use_tqdm=False)
    assert [len(o.prompt_token_ids) for o in found] == golden["lengths"].tolist()
    assert golden["lengths"].max() == 256 and golden["lengths"].min() <= 4
    vectors = np.array([o.outputs.embedding for o in found], np.float32)
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-4, rtol=0)
    assert np.abs(vectors - golden["vectors"]).max() < 1e-6  # what it is today
    for index in range(0, 50, 3):
        alone = minilm.embed(texts[index], truncate_prompt_tokens=-1)[0]
        assert alone.outputs.embedding == found[index].outputs.embedding, texts[index]


@pytest.mark.models
def test_embed_speaks_vllms_words(minilm: LLM) -> None:
    outputs = minilm.embed(["a harbour in winter", {"prompt_token_ids": [101, 2026, 102]}])
    first = outputs[0]
    assert first.outputs.hidden_size == 384 and first.prompt == "a harbour in winter" and first.finished
    assert outputs[1].prompt_token_ids == [101, 2026, 102] and outputs[1].prompt is None
    assert abs(np.linalg.norm(first.outputs.embedding) - 1) < 1e-6
    short = minilm.embed("a harbour in winter", pooling_params=PoolingParams(dimensions=8))[0].outputs
    wanted = np.array(first.outputs.embedding[:8])
    np.testing.assert_allclose(short.embedding, wanted / np.linalg.norm(wanted), atol=1e-6)
    near, far = (
        float(np.dot(o.outputs.embedding, first.outputs.embedding))
        for o in minilm.embed(["a port in the cold season", "compilers emit machine code"])
    )
    assert near > 0.5 > far
    long = "word " * 300
    with pytest.raises(UsageError, match=r"302 tokens.*256.*truncate_prompt_tokens"):
        minilm.embed(long)
    cut = minilm.embed(long, truncate_prompt_tokens=10)[0].prompt_token_ids
    assert len(cut) == 10 and (cut[0], cut[-1]) == (101, 102)
    with pytest.raises(UsageError, match=r"prompts\[1\].*40000"):
        minilm.embed([[101, 102], [40000]])
    with pytest.raises(UsageError, match="dimensions"):
        minilm.embed("x", pooling_params=PoolingParams(dimensions=385))
    with pytest.raises(UsageError, match="BertModel gives embeddings"):
        minilm.generate("x")
    assert minilm.engine.stats().blocks_used == 0 and not minilm.engine.has_work()


def test_longest_text_is_what_the_directory_says(tmp_path: Path) -> None:
    path = encoders.save(tmp_path, "bert_mean")
    encoders.save_modules(path, "mean", True, longest=20)
    assert encoders.load(path).limits.max_model_len == 20
    assert encoders.load(path, max_model_len=9).limits.max_model_len == 9
    with pytest.raises(UsageError, match="--max-num-batched-tokens 19"):
        encoders.load(path, max_num_batched_tokens=19)
    with pytest.raises(UsageError, match="--max-model-len 21"):
        encoders.load(path, max_model_len=21)


def test_names_of_checkpoints_with_a_head_and_of_old(tmp_path: Path) -> None:
    config = encoders.CASES["bert_mean"]["config"]
    tensors = tiny.random_tensors("bert_mean", config)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    other: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition("LayerNorm.")
        other["bert." + (stem + old["LayerNorm." + last] if stem else name)] = tensor
    tiny.save(tmp_path / "other", config, other)
    encoders.save_modules(tmp_path / "other", "mean", True)
    texts = encoders.token_texts("bert_mean")
    ours = [encoders.embed(encoders.load(p), texts) for p in
            (encoders.save(tmp_path / "plain", "bert_mean"), tmp_path / "other")]  # fmt: skip
    assert np.array_equal(*ours)


def write_gguf(path: Path, name: str, pooling: int) -> Path:
    """A case as llama.cpp's converter writes it."""
    config = encoders.CASES[name]["config"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_token_type_count(config["type_vocab_size"])
        writer.add_causal_attention(False)
        writer.add_uint32("bert.pooling_type", pooling)

    return write_file(path, gguf.MODEL_ARCH.BERT, config, metadata, tiny.random_tensors(name, config))


def test_gguf_equals_safetensors(tmp_path: Path) -> None:
    texts = encoders.token_texts("bert_mean")
    wanted = encoders.embed(encoders.load(encoders.save(tmp_path, "bert_mean")), texts)
    mean = encoders.load(write_gguf(tmp_path / "mean.gguf", "bert_mean", 1))
    assert np.array_equal(encoders.embed(mean, texts), wanted)
    cls = encoders.embed(encoders.load(write_gguf(tmp_path / "cls.gguf", "bert_mean", 2)), texts)
    encoders.save_modules(tmp_path, "cls", True)
    assert np.array_equal(cls, encoders.embed(encoders.load(tmp_path), texts))
    with pytest.raises(ModelError, match="pooling_type is 4"):
        encoders.load(write_gguf(tmp_path / "rank.gguf", "bert_mean", 4))


def _edit(path: Path, name: str, **fields: Any) -> None:
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "modules.json").write_text('[{"type": "a.models.Dense"}]'), "'Dense'.*not supported"),
        (lambda p: (p / "modules.json").write_text("{}"), "modules.json.*list"),
        (lambda p: (p / "modules.json").write_text("[[["), "modules.json.*JSON"),
        (lambda p: (p / "modules.json").write_text("[1]"), "modules.json.*list of modules"),
        (
            lambda p: (p / "config_sentence_transformers.json").write_text(
                '{"prompts": {"query": "q"}, "default_prompt_name": "other"}'
            ),
            "'other' is none of its prompts",
        ),
        (lambda p: _edit(p / "1_Pooling", "config.json", pooling_mode_cls_token=True), "mean, cls"),
        (lambda p: _edit(p / "1_Pooling", "config.json", pooling_mode="max"), "pooling is 'max'"),
        (lambda p: (p / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json"),
        (lambda p: _edit(p, "sentence_bert_config.json", max_seq_length="x"), "max_seq_length"),
        (lambda p: _edit(p, "config.json", position_embedding_type="relative_key"), "relative_key"),
        (lambda p: _edit(p, "config.json", is_decoder=True), "is_decoder"),
        (lambda p: _edit(p, "config.json", num_attention_heads=5), "num_attention_heads"),
        (lambda p: _edit(p, "config.json", max_position_embeddings=99), "position_embeddings.*instead of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    path = encoders.save(tmp_path, "bert_mean")
    change(path)
    with pytest.raises(ModelError, match=message) as caught:
        encoders.load(path)
    assert "\n" not in str(caught.value)


def test_without_modules_the_mean_is_taken_and_said(tmp_path: Path) -> None:
    path = encoders.save(tmp_path, "xlm_roberta_mean")
    texts = encoders.token_texts("xlm_roberta_mean")
    with_modules = encoders.embed(encoders.load(path), texts)
    (path / "modules.json").unlink()
    backend = encoders.load(path)
    assert np.array_equal(encoders.embed(backend, texts), with_modules)
    assert any("no modules.json" in note for note in backend._model.program.notes)


def test_plan_and_info_speak_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = encoders.save(tmp_path, "bert_mean")
    given = ["plan", "--model", str(path), "--device", "cpu", "--bandwidth", "10", "--tflops", "1"]
    assert main([*given, "--batch", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["step"] == {"batch": 3, "query_len": 64, "context": 64}
    attention = next(op for op in plan["ops"] if op["kind"] == "textattention")
    assert attention["kv_bytes"] == 0 and attention["flops"] == 3 * 64 * 64 * 4 * (4 * 12 + 5)
    assert plan["ops"][-1]["writes"] == {"embeddings": [3, 48]}
    assert main([*given, "--context", "9"]) == 0
    assert "texts of 9 tokens" in capsys.readouterr().out
    assert main([*given, "--context", "9", "--prefill", "5"]) == 2
    assert "computes texts whole" in capsys.readouterr().err
    assert main(["info", "--model", str(path), "--device", "cpu"]) == 0
    assert "layers with attention  2" in capsys.readouterr().out
