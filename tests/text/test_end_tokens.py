"""End tokens and special tokens from all files that name them, as Transformers and llama.cpp read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rvllm.engine.ipc.messages import ModelFacts, Output
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import ModelError
from rvllm.text.processor import Choice
from rvllm.text.requests import RequestMaker
from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.text import tiny_tokenizers as tiny
from support.text.tiny_tokenizers import byte_level_metadata, trained


def facts(eos: list[int]) -> ModelFacts:
    return ModelFacts(architecture="x", model_path="x", vocab_size=600, max_model_len=64, eos_token_ids=eos,
                      bos_token_id=None, dtype="float32", generation_config={})  # fmt: skip


def saved(path: Path, config: dict[str, Any], **files: Any) -> Path:
    backend = trained()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("named", [[], [7]])
def test_the_tokenizers_end_token_ends_an_answer(tmp_path: Path, named: list[int]) -> None:
    tokenizer = Tokenizer.load(saved(tmp_path, {"eos_token": "<|im_end|>"}))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end is not None and end == tokenizer.eos_token_id
    maker = RequestMaker(facts(named), 0, tokenizer)
    (request,) = maker.make("r", [1, 2], SamplingParams())
    assert request.sampling.stop_token_ids == (*named, end)
    (request,) = maker.make("r", [1, 2], SamplingParams(ignore_eos=True))
    assert request.sampling.stop_token_ids == ()
    choice = Choice(tokenizer, SamplingParams(), [1, 2])
    delta = choice.feed(Output(request_id="r", token_ids=[end], finish_reason="stop", stop_reason=end))
    assert (delta.finish_reason, delta.stop_reason) == ("stop", None)
    choice = Choice(tokenizer, SamplingParams(stop_token_ids=[9]), [1, 2])
    delta = choice.feed(Output(request_id="r", token_ids=[9], finish_reason="stop", stop_reason=9))
    assert delta.stop_reason == 9


def test_an_end_token_without_an_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="eos_token is '<nowhere>'"):
        Tokenizer.load(saved(tmp_path, {"eos_token": "<nowhere>"}))


@pytest.mark.oracle
def test_added_and_special_tokens_are_read_wherever_they_stand(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = trained().get_vocab_size(with_added_tokens=True)
    path = saved(
        tmp_path,
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<think>"],
         "tokenizer_class": "PreTrainedTokenizerFast",
         "added_tokens_decoder": {str(size): {"content": "<|new|>", "special": True}}},
    )  # fmt: skip
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in ("a <think>b</think> <|new|>c<|im_end|>", "<|new|><think>"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_older_checkpoints_keep_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    size = trained().get_vocab_size(with_added_tokens=True)
    tokenizer = Tokenizer.load(saved(tmp_path, {"eos_token": "<|im_end|>"}, added_tokens={"<|old|>": size}))
    assert tokenizer.encode("<|old|>", add_special_tokens=False) == [size]


def test_an_end_that_a_gguf_file_types_as_text_is_a_control_token() -> None:
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    end = tokens.index("<|im_end|>")
    metadata["tokenizer.ggml.token_type"][end] = 1
    tokenizer = Tokenizer(from_metadata(metadata, "tiny"))
    assert end in tokenizer.special_ids
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=False)[-1] == end


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_files_without_a_tokenizer_json_are_cut_as_their_class_cuts(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = json.loads(trained().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(trained().get_vocab(with_added_tokens=True)))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    ends = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **ends}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind[:5].lower().rstrip("t")}))
    ours = Tokenizer.load(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    for text in ("We'LL see 1234 the\n\n  and", "e\u0301te\u0301 na\u00efve", "hello  world\n of in"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.oracle
def test_the_option_legacy_of_a_sentencepiece_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_file(True))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    model = json.loads(ours.backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = transformers.LlamaTokenizer(
        vocab=model["vocab"], merges=merges, legacy=False, add_prefix_space=True
    )
    for text in ("hello world", "hello<s>world", "  lead", "<s>hello</s>world ", "\n x"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
