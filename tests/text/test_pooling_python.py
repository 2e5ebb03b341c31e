"""`LLM`'s vectors, classes and scores; pairs of texts as the tokenizers library encodes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm import LLM, PoolingParams
from rvllm.errors import UsageError
from rvllm.text.tokenizers.parts import TokenizerParts
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.models.tiny_llm import SETTINGS, directory
from support.text import tiny_tokenizers as tiny

TEXTS = ["hello world", "def main():", "the lazy dog"]


def loaded(path: Path, **settings: Any) -> LLM:
    return LLM(str(path), **SETTINGS, **settings)


def test_a_generating_model_gives_vectors_when_asked(tmp_path: Path) -> None:
    path = directory(tmp_path)
    with loaded(path, runner="pooling") as llm, loaded(path, task="embed") as other:
        vectors = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert vectors == [output.outputs.embedding for output in other.embed(TEXTS, use_tqdm=False)]
        (first,) = llm.encode(TEXTS[0], pooling_task="embed", use_tqdm=False)
        assert first.outputs.data.shape == (32,) and first.outputs.data.tolist() == vectors[0]
        score = llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)[1].outputs.score
        assert score == pytest.approx(float(np.dot(vectors[0], vectors[2])), abs=1e-5)
        for what in (lambda: llm.classify("a"), lambda: llm.encode("a", pooling_task="classify")):
            with pytest.raises(UsageError, match="gives vectors and no classes"):
                what()
        with pytest.raises(UsageError, match="gives embeddings and generates no text"):
            llm.generate("a")
        (rows,) = llm.encode(TEXTS[0], pooling_task="token_embed", use_tqdm=False)
        assert rows.outputs.data.shape == (len(rows.prompt_token_ids), 32)
        np.testing.assert_allclose(rows.outputs.data[-1], vectors[0], atol=1e-6)
        short = PoolingParams(dimensions=8, task="token_embed")
        cut = llm.encode(TEXTS[:2], short, use_tqdm=False)[0].outputs.data
        wanted = rows.outputs.data[:, :8] / np.linalg.norm(rows.outputs.data[:, :8], axis=1, keepdims=True)
        np.testing.assert_allclose(cut, wanted, atol=1e-6)
        raw = PoolingParams(use_activation=False, task="token_embed")
        assert np.linalg.norm(llm.encode(TEXTS[0], raw, use_tqdm=False)[0].outputs.data[0]) > 1.01
    with loaded(path, runner="pooling", pooler_config={"pooling_type": "MEAN", "normalize": False}) as mean:
        (output,) = mean.embed(TEXTS[0], use_tqdm=False)
        assert abs(np.linalg.norm(output.outputs.embedding) - 1) > 1e-3


def test_classes(tmp_path: Path) -> None:
    names = {"0": "good", "1": "bad", "2": "so so"}
    path = directory(tmp_path, architectures=["LlamaForSequenceClassification"], id2label=names)
    with loaded(path) as llm:
        found = llm.classify(TEXTS, use_tqdm=False)
        raw = [output.outputs.data for output in llm.reward(TEXTS, use_tqdm=False)]
        for output, numbers in zip(found, raw, strict=True):
            assert output.outputs.num_classes == 3
            wanted = np.exp(numbers) / np.exp(numbers).sum()
            np.testing.assert_allclose(output.outputs.probs, wanted, rtol=1e-5)
        (tokens,) = llm.encode(TEXTS[0], pooling_task="token_classify", use_tqdm=False)
        np.testing.assert_allclose(tokens.outputs.data[-1], found[0].outputs.probs, atol=1e-6)
        np.testing.assert_allclose(tokens.outputs.data.sum(axis=1), 1, atol=1e-5)
        with pytest.raises(UsageError, match="scores are of models with one class"):
            llm.score("a", "b")
        with pytest.raises(UsageError, match="gives classes and no vectors"):
            llm.embed("a")


def test_a_model_that_gives_classes_of_tokens_gives_none_of_texts(tmp_path: Path) -> None:
    with loaded(directory(tmp_path, architectures=["LlamaForTokenClassification"], num_labels=5)) as llm:
        (found,) = llm.encode(TEXTS[0], use_tqdm=False)
        assert found.outputs.data.shape == (len(found.prompt_token_ids), 5)
        for what in (lambda: llm.classify("a"), lambda: llm.score("a", "b")):
            with pytest.raises(UsageError, match="gives classes of tokens and none of texts"):
                what()
        with pytest.raises(UsageError, match="task must be one of embed, classify, token_embed, token_class"):
            llm.encode("a", pooling_task="plugin")


def test_a_cross_encoder_of_a_decoder_reads_both_texts_as_one(tmp_path: Path) -> None:
    overrides = {"architectures": ["LlamaForSequenceClassification"], "classifier_from_token": ["he", "lo"],
                 "is_original_qwen3_reranker": True}  # fmt: skip
    backend = tiny.trained()
    overrides["classifier_from_token"] = [backend.id_to_token(300), backend.id_to_token(301)]
    with loaded(directory(tmp_path), hf_overrides=overrides) as llm:
        assert llm.engine.facts.labels == ["LABEL_0"]
        (output,) = llm.score("hello ", "world", use_tqdm=False)
        assert output.prompt_token_ids == llm.get_tokenizer().encode("hello world")
        (number,) = llm.reward("hello world", use_tqdm=False)
        assert output.outputs.score == pytest.approx(1 / (1 + np.exp(-number.outputs.data[0])), abs=1e-6)
        numbers = PoolingParams(use_activation=False)
        (raw,) = llm.score("hello ", "world", use_tqdm=False, pooling_params=numbers)
        assert raw.outputs.score == pytest.approx(float(number.outputs.data[0]))


@pytest.mark.parametrize("kind", ["bert", "roberta", "plain"])
@pytest.mark.parametrize("limit", [None, 16, 9, 4])
def test_pairs_are_encoded_and_cut_as_the_library_does(kind: str, limit: int | None) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tiny.trained().to_str())
    begin, end = (("<|endoftext|>", backend.token_to_id("<|endoftext|>")),
                  ("<|im_end|>", backend.token_to_id("<|im_end|>")))  # fmt: skip
    if kind == "bert":
        backend.post_processor = processors.BertProcessing(end, begin)
    elif kind == "roberta":
        backend.post_processor = processors.RobertaProcessing(end, begin)
    tokenizer = Tokenizer(TokenizerParts(backend, "here"))
    library = Backend.from_str(backend.to_str())
    if limit is not None:
        library.enable_truncation(limit)
    texts = ("hello world the", "def main(): print the quick brown fox", "日本語", "x")
    for first in texts:
        for second in texts:
            ids, begins = tokenizer.encode_pair(first, second, limit)
            wanted = library.encode(first, second)
            assert ids == wanted.ids, (first, second)
            if kind != "plain":  # a tokenizer without marks around texts has no kinds either
                assert begins == (wanted.type_ids.index(1) if 1 in wanted.type_ids else None)


def test_prompts_go_before_texts(tmp_path: Path) -> None:
    path = directory(tmp_path)
    modules = [{"idx": i, "name": str(i), "path": f"{i}_Pooling" if i else "", "type": f"x.{kind}"}
               for i, kind in enumerate(["Transformer", "Pooling"])]  # fmt: skip
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    prompts = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with loaded(path) as llm:
        encode = llm.get_tokenizer().encode
        (plain,) = llm.embed("hello", use_tqdm=False)
        (query,) = llm.embed("hello", prompt_name="query", use_tqdm=False)
        assert plain.prompt_token_ids == encode("hello")
        assert query.prompt_token_ids == encode("find: hello")
        with pytest.raises(UsageError, match="'other' is none of the model's prompts: document, query"):
            llm.embed("hello", prompt_name="other")
    (path / "config_sentence_transformers.json").write_text(
        json.dumps(prompts | {"default_prompt_name": "query"})
    )
    with loaded(path) as llm:
        (query,) = llm.embed("hello", use_tqdm=False)
        assert query.prompt_token_ids == encode("find: hello")
