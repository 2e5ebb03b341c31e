"""Tokenizers from directories and GGUF metadata: the same ids as the formulas, clear refusals."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from rvllm.errors import ModelError, UsageError
from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.pretokenizers import PRE_TOKENIZERS
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.text import tiny_tokenizers as tiny

AWKWARD = [
    "", " ", "\n\n", "  two  spaces ", "don't DON'T", "a\r\nb\tc", "12345 6", "日本語 中文", "😀👍🏽",
    "é e\u0301", "<|im_start|>user\nhi<|im_end|>", "<think> x", "\x00\ufeff\u200b", "naïve Größe",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_gguf_metadata_gives_the_directorys_ids(text: str, tmp_path: Path) -> None:
    ours = tiny.byte_level()
    directory = Tokenizer.load(tiny.write_directory(tmp_path))
    expected = tiny.trained().encode(text).ids
    assert ours.encode(text) == expected == directory.encode(text)
    assert ours.decode(expected) == text == directory.decode(expected)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_byte_level_round_trip(text: str) -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_control_tokens_are_hidden_and_defined_ones_shown() -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.encode("<|im_start|>a<think>b<|im_end|>")
    assert [tokenizer.token_text(i) for i in ids] == ["<|im_start|>", "a", "<think>", "b", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.eos_token_id == ids[-1]
    assert tokenizer.eos_token == "<|im_end|>"
    assert ids[0] in tokenizer.special_ids
    assert ids[2] not in tokenizer.special_ids


def test_bos_and_eos_are_added_where_the_file_says_so() -> None:
    extra = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer(from_metadata(tiny.byte_level_metadata() | extra, "x"))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert tiny.sentencepiece().encode("hello")[0] == 1  # SentencePiece's default is to add it
    assert tiny.byte_level().encode("hello") == plain


def test_some_pre_tokenizers_bring_a_bos() -> None:
    tokenizer = tiny.byte_level(pre="llama-bpe")
    assert tokenizer.encode("hello")[0] == tokenizer.bos_token_id
    never = tiny.byte_level(pre="llama-bpe", **{"tokenizer.ggml.add_bos_token": False})
    assert never.encode("hello") == tokenizer.encode("hello")[1:]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "eos_token": None},
        {"added_tokens_decoder": {"NEXT": {"content": "<|tool|>", "special": True}}},
    ],
    ids=json.dumps,
)
def test_directories_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    free = str(tiny.trained().get_vocab_size())
    config = json.loads(json.dumps(config).replace("NEXT", free))
    base = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": tiny.TEMPLATE}
    path = tiny.write_directory(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"} | base | config)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.load(path)
    for text in [*AWKWARD, "a<|tool|>b"]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, return_dict=False)


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    tokenizer = tiny.byte_level()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_unknown_ids_decode_to_nothing() -> None:
    tokenizer = tiny.byte_level()
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize("ids", [[-1], [1 << 32], ["a"], [1.5], -1])
def test_what_is_no_token_id_is_refused(ids: Any) -> None:
    with pytest.raises(UsageError, match="token ids must be whole numbers"):
        tiny.byte_level().decode(ids)


def sentencepiece_by_the_book(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's BPE as its paper describes it: join the best-scored neighbours, leftmost first."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not joins:
            return pieces
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from(["hello", "world", "the", " ", "hell", "o", "wor", "lé", ".", "d"])).map("".join)
)
def test_sentencepiece_merges_follow_the_scores(text: str) -> None:
    tokenizer = tiny.sentencepiece()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == sentencepiece_by_the_book(
        text, tiny.sentencepiece_metadata()
    )
    assert tokenizer.decode(ids) == text


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = tiny.sentencepiece()
    ids = tokenizer.encode("日é", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0xE6>", "<0x97>", "<0xA5>", "é"]
    assert tokenizer.decode(ids) == "日é"
    assert tokenizer.token_bytes(ids[1]) == b"\xe6"
    assert tokenizer.token_text(ids[1]) == "\ufffd"
    assert tokenizer.token_bytes(ids[0]) == b" "


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_own_file(prefix: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_file(prefix))
    tokenizer = Tokenizer.load(tmp_path)
    metadata = tiny.sentencepiece(**{"tokenizer.ggml.add_space_prefix": prefix})
    for text in ["hello world", "", "  two", "日 x", "<s>hello</s>"]:
        assert tokenizer.encode(text) == metadata.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == metadata.decode(tokenizer.encode(text))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert Tokenizer.load(tmp_path).encode("hello") == [*metadata.encode("hello", False), 2]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_sentencepiece_file_is_refused_or_read(data: st.DataObject) -> None:
    content = bytearray(tiny.sentencepiece_file(True))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(content)
        try:
            Tokenizer.load(Path(folder)).encode("hello world")
        except ModelError as error:
            assert "tokenizer.model: " in str(error)
            assert "\n" not in str(error)


@pytest.mark.oracle
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize(("kind", "size"), [("bpe", 400), ("unigram", 340)])
def test_sentencepiece_models_equal_sentencepiece(kind: str, size: int, rule: str, tmp_path: Path) -> None:
    package = pytest.importorskip("sentencepiece")
    package.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(tiny.CORPUS).splitlines() * 3),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=size,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        minloglevel=2,
    )
    theirs = package.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer.load(tmp_path)
    for text in [
        "hello world",
        "The quick  brown fox doesn't",
        "日本語 😀 x",
        "  lead",
        "",
        "a\nb\tc",
        "Größe 123",
    ]:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def test_wordpiece_from_both_sources(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny.PIECES), encoding="utf-8")
    for tokenizer in (tiny.wordpiece(), Tokenizer.load(tmp_path)):
        ids = tokenizer.encode("Hello, UNBELIEVABLE worlds")
        pieces = ["[CLS]", "hello", ",", "un", "##believ", "##able", "[UNK]", "[SEP]"]
        assert tokenizer.convert_ids_to_tokens(ids) == pieces


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_pre_tokenizers_lose_nothing(name: str) -> None:
    text = "Hello  WORLD's 1234567 don't\n\n x=y+1; 日本語。ﬁ 😀 ١٢٣ \t é ok?!\r\n   end "
    steps = [pre_tokenizers.Split(Regex(s), "isolated") for s in PRE_TOKENIZERS[name].splits]
    pieces = [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert len(pieces) > 15


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "a 1234  b", ["a", " 1234", " ", " b"]),
        ("smollm", "a 12  3", ["a", " ", "1", "2", "  ", "3"]),
        ("llama-bpe", "in 1234567", ["in", " ", "123", "456", "7"]),
        ("qwen2", "Don'T 42\n\n", ["Don", "'T", " ", "4", "2", "\n\n"]),
        ("deepseek-llm", "x 日本 123", ["x", " ", "日本", " ", "123"]),
        ("deepseek-coder", "a(b) 12", ["a", "(", "b", ")", " ", "1", "2"]),
        ("gpt-4o", "HelloWorld'S 1234", ["Hello", "World'S", " ", "123", "4"]),
        ("tekken", "HELLOworld 12", ["HELLOworld", " ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_as_published(name: str, text: str, pieces: list[str]) -> None:
    steps = [pre_tokenizers.Split(Regex(s), "isolated") for s in PRE_TOKENIZERS[name].splits]
    assert [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)] == pieces


def test_whole_words_skip_the_merges_where_the_rule_says_so() -> None:
    metadata = tiny.byte_level_metadata("llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqzq"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert len(Tokenizer(from_metadata(metadata, "x")).encode("zqzq", add_special_tokens=False)) == 1
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"  # the same splits, without that rule
    assert len(Tokenizer(from_metadata(metadata, "x")).encode("zqzq", add_special_tokens=False)) > 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "tokenizer.ggml.pre is 'martian'"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["nosuch pair"]}, "tokenizer.ggml.merges do not fit"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x'"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer.ggml.model is "),
        ({"tokenizer.ggml.pre": ["qwen2"]}, "tokenizer.ggml.pre is "),
        ({"tokenizer.ggml.token_type": "no"}, r"tokenizer.ggml.\*: "),
    ],
)
def test_broken_metadata_is_named(change: dict[str, Any], named: str) -> None:
    metadata = {k: v for k, v in (tiny.byte_level_metadata() | change).items() if v is not None}
    with pytest.raises(ModelError, match="^tiny.gguf: " + named) as caught:
        from_metadata(metadata, "tiny.gguf")
    assert "\n" not in str(caught.value)


def test_tokens_that_are_not_utf8_do_no_harm() -> None:
    metadata = tiny.byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "a\udcffb"]
    tokenizer = Tokenizer(from_metadata(metadata, "x"))
    assert tokenizer.encode("hello") == tiny.byte_level().encode("hello")


def test_scores_must_match_the_tokens() -> None:
    with pytest.raises(ModelError, match=r"tokenizer.ggml.scores must hold one number"):
        tiny.sentencepiece(**{"tokenizer.ggml.scores": [1.0]})


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer .*skip-tokenizer-init"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model": 1}', "[]", ""])
def test_broken_tokenizer_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer.json: ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_that_needs_an_unknown_token_which_is_not_there(tmp_path: Path) -> None:
    tiny.write_directory(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"] |= {"unk_token": "none", "vocab": {"h": 0, "i": 1}, "merges": []}
    data |= {"added_tokens": [], "post_processor": None, "pre_tokenizer": None}
    file.write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hi") == [0, 1]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["hi", text])):
        with pytest.raises(UsageError, match=r"cannot encode this text: .*not found in the vocabulary"):
            encode("hello")


@pytest.mark.parametrize("prefix", ["x", "xyz", "##", "ü"])
def test_a_prefix_that_cuts_a_merge_within_a_character(prefix: str, tmp_path: Path) -> None:
    """The library would abort the process; see `_check_merges`."""
    tiny.write_directory(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["continuing_subword_prefix"] = prefix
    file.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"tokenizer.json: .") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, {"a": 0}])
def test_merges_of_tokens_that_are_not_there(vocab: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ModelError, match=r"vocab.json or merges.txt: ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_template_that_is_no_text(name: str, tmp_path: Path) -> None:
    tiny.write_directory(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / name).write_bytes(b"\xff\xfe{{")
    with pytest.raises(ModelError, match=r"jinja: cannot read the file: not UTF-8"):
        Tokenizer.load(tmp_path)


def test_broken_tokenizer_config(tmp_path: Path) -> None:
    tiny.write_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"tokenizer_config.json: not readable as JSON"):
        Tokenizer.load(tmp_path)


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    tiny.write_directory(tmp_path)
    file = tmp_path / "tokenizer.json"
    value = json.loads(file.read_text())
    value["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(value))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_tokens_named_only_by_the_config_are_added(tmp_path: Path) -> None:
    size = tiny.trained().get_vocab_size()
    config = {"added_tokens_decoder": {str(size): {"content": "<|tool|>", "special": True}}}
    tokenizer = Tokenizer.load(tiny.write_directory(tmp_path, config))
    assert tokenizer.encode("<|tool|>") == [size]
    assert tokenizer.decode([size], skip_special_tokens=True) == ""


def test_chat_templates_of_a_directory(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "inside"}, {"name": "tool_use", "template": "tools"}]
    tiny.write_directory(tmp_path, {"chat_template": named})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.get_chat_template() == "inside"
    assert tokenizer.get_chat_template(tools=True) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("documents")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.get_chat_template() == "file"
    assert tokenizer.get_chat_template("rag") == "documents"
    with pytest.raises(UsageError, match="no chat template 'other', only default, rag, tool_use"):
        tokenizer.get_chat_template("other")


def test_no_chat_template() -> None:
    with pytest.raises(UsageError, match=r"tiny.gguf has no chat template; .*--chat-template"):
        tiny.sentencepiece().apply_chat_template([{"role": "user", "content": "hi"}])


def test_apply_chat_template_gives_ids_of_the_special_tokens() -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert ids == tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_gemma_4_merges_within_lines_and_within_line_ends() -> None:
    """llama.cpp's rules: `[^\\n]+|[\\n]+` is cut first, ▁ stands for a space, a text begins with BOS."""
    pieces = ["▁", "a", "b", "\n", "ab", "▁ab", "\n\n", "ab\n"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.merges": ["a b", "ab \n", "▁ ab", "\n \n"], "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    tokenizer = Tokenizer(from_metadata(metadata, "here"))
    found = [tokens[i] for i in tokenizer.encode("ab\n\n\n abé")]
    assert found == ["<bos>", "ab", "\n\n", "\n", "▁ab", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab\n\n\n abé"), skip_special_tokens=True) == "ab\n\n\n abé"
