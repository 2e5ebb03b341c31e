"""tiktoken's vocabulary files: the same tokens as its algorithm gives, and what is refused."""

from __future__ import annotations

import base64
import json
import random
import time
from itertools import pairwise
from pathlib import Path

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
