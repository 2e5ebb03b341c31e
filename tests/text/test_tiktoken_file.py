"""tiktoken's vocabulary files and Mistral's tekken.json: the algorithm's own tokens, and what is refused."""

from __future__ import annotations

import base64
import json
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rvllm.errors import ModelError
from rvllm.text.tokenizers.spelling import CHARACTER_BYTES
from rvllm.text.tokenizers.tiktoken import CLASSES, merges_of
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.weights.gguf.container import read_gguf
from support.models.fetched import model_path
from support.text.tiny_tokenizers import CORPUS, trained

CL100K = (  # as tiktoken publishes it
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)


def as_bytes(token: str) -> bytes:
    return bytes(CHARACTER_BYTES[c] for c in token)


def ranks() -> dict[bytes, int]:
    """The tokens of a small trained vocabulary, bytes first, then merges in their order."""
    backend = trained("llama3")
    vocab = backend.get_vocab(with_added_tokens=False)
    return {
        bytes(CHARACTER_BYTES[c] for c in t): i for i, t in enumerate(sorted(vocab, key=vocab.__getitem__))
    }


def directory(path: Path, lines: list[str], tokenizer_class: str = "Phi3SmallTokenizer") -> Path:
    (path / "cl100k_base.tiktoken").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": tokenizer_class,
        "eos_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def lines_of(ranked: dict[bytes, int]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranked.items()]


def by_tiktoken(text: str, ranked: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: in each piece, the neighbours whose union has the lowest rank become one."""
    regex = pytest.importorskip("regex", reason="comes with transformers (the extra oracle)")
    out = []
    for piece in regex.findall(CL100K, text):
        parts = [bytes([b]) for b in piece.encode()]
        if piece.encode() in ranked:
            parts = [piece.encode()]
        while len(parts) > 1:
            pairs = [(ranked.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, at = min(pairs)
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [ranked[part] for part in parts]
    return out


def test_tokens_are_tiktokens(tmp_path: Path) -> None:
    ranked = ranks()
    tokenizer = Tokenizer.load(directory(tmp_path, lines_of(ranked)))
    source = random.Random(0)
    texts = ["", *CORPUS[:4], "I'll we'VE  don't\n\n\n x \t12345 !!??\r\n aaaaaaaa", "\x00\x7f\u200b 🇩🇪"]
    alphabet = "".join(CORPUS) + " \n\té日1"
    texts += ["".join(source.choices(alphabet, k=60)) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == by_tiktoken(text, ranked), repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens_of_phi_3_small(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory(tmp_path, lines_of(ranks())))
    ids = tokenizer.encode("<|user|>hello<|end|>")
    assert (ids[0], ids[-1]) == (100262, 100266)
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert tokenizer.backend.token_to_id("<|endoftext|>") == 100257
    special = CLASSES["Phi3SmallTokenizer"]().special
    assert sorted(special) == list(range(100256, 100352)) and len(set(special.values())) == 96
    assert special[100256] == "<|dummy_id_2|>" and special[100351] == "<|dummy_id_86|>"
    assert {i for i in special if "dummy" not in special[i]} <= tokenizer.special_ids


@pytest.mark.models
def test_merges_are_those_that_qwen_publishes() -> None:
    """Its vocabulary is tiktoken's kind, and its GGUF file holds both the tokens in order and the merges."""
    metadata = read_gguf(model_path("qwen2.5-coder-0.5b")).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ranked = {as_bytes(t): i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    began = time.process_time()
    merges = merges_of(ranked)
    assert time.process_time() - began < 5.0  # takes one second
    assert merges == [tuple(map(as_bytes, m.split(" "))) for m in metadata["tokenizer.ggml.merges"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["AA== zero"], "line 1 is not a token in base64 and its rank"),
        (["AA== 0", "!!! 1"], "line 2 is not"),
        (["AA== 0"], "holds no token for byte 1"),
        ([*lines_of({bytes([b]): b for b in range(256)}), "YWE= 9"], "two tokens have the same rank"),
        ([*lines_of({bytes([b]): b for b in range(256)}), "YWE= 100262"], "rank 100262 is that of a special"),
    ],
)
def test_damaged_files_are_refused_in_one_line(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(directory(tmp_path, lines))
    assert message in str(caught.value) and "cl100k_base.tiktoken" in str(caught.value)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer_class 'QWenTokenizer' does not say how texts are cut"):
        Tokenizer.load(directory(tmp_path, lines_of(ranks()), "QWenTokenizer"))


def tekken(path: Path, ranked: dict[bytes, int], **changes: Any) -> Path:
    vocab = [
        {"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in ranked.items()
    ]
    config = {"pattern": CL100K, "default_vocab_size": len(ranked) + 30, "default_num_special_tokens": 32}
    (path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab} | changes))
    return path


def test_tekkens_tokens_stand_behind_its_special_ones(tmp_path: Path) -> None:
    """The last two tokens are beyond the model's vocabulary, as in the files that Mistral publishes."""
    ranked = ranks()
    tokenizer = Tokenizer.load(tekken(tmp_path, ranked))
    kept = {token: rank for token, rank in ranked.items() if rank < len(ranked) - 2}
    assert tokenizer.vocab_size == len(ranked) + 30
    for text in ["", *CORPUS, "I'll we'VE  don't\n\n x \t12345 !!??"]:
        assert tokenizer.encode(text) == [1, *(rank + 32 for rank in by_tiktoken(text, kept))], repr(text)
    ids = tokenizer.encode("[INST]a[/INST]<SPECIAL_31>", add_special_tokens=False)
    assert (ids[0], *ids[2:]) == (3, 4, 31) and set(ids) - {ids[1]} <= tokenizer.special_ids
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert tokenizer.special_tokens == named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "missing required field"),
        ({"vocab": []}, "holds no token for byte 0"),
        ({"special_tokens": [{"rank": 32, "token_str": "<s>"}]}, "special token 32 is none of the first 32"),
        ({"special_tokens": [{"rank": r, "token_str": "<s>"} for r in (1, 2)]}, "have the same name"),
        ({"vocab": [{"rank": 3, "token_bytes": "?"}]}, "rank 3 is not in base64"),
    ],
)
def test_damaged_tekken_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tekken(tmp_path, ranks(), **changes))


@pytest.mark.parametrize("version", ["v7", "v7m1", "v11", "v13", "v3"])
def test_a_tekken_file_alone_has_mistrals_template(version: str, tmp_path: Path) -> None:
    """What mistral-common 1.13 gives for the same conversation, with special tokens spelled out."""
    file = tekken(tmp_path, ranks()) / "tekken.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"config": data["config"] | {"version": version}}))
    tokenizer = Tokenizer.load(tmp_path)
    if version == "v3":
        assert not tokenizer.chat_templates
        return
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "hm ", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "r"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "a"}, {"role": "user", "content": "b"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    told = (
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "", '
        '"parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
    )
    calls = {
        "v7": '[TOOL_CALLS][{"name": "f", "arguments": {"a": "é"}, "id": "abcdefghi"}]',
        "v11": '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": "é"}',
        "v13": '[TOOL_CALLS]f[ARGS]{"a": "é"}',
    }[version.partition("m")[0]]
    result = "" if version == "v13" else "abcdefghi[TOOL_CONTENT]"
    first, last = (told, "") if version == "v13" else ("", told)
    wanted = (
        f"<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT]{first}[INST]q[/INST]hm{calls}</s>"
        f"[TOOL_RESULTS]{result}r[/TOOL_RESULTS]ok</s>{last}[INST]a\n\nb[/INST]"
    )
    found = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert found == wanted
