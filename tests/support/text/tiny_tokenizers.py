"""Small tokenizers of each kind, as a directory holds them and as a GGUF file describes them."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 12345 times faster!\n",
    "def main():\n    print('hello world')\n    return {'key': [1, 2, 3]}\n",
    "Größe, naïve café, Привет мир, 日本語の文章です。中文。 😀😀👍 emoji\n",
    "user assistant system tool hello hello world world the the and and of of in in\n",
] * 3
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFINED = ("<think>",)


@cache
def trained(pattern: str = "qwen2") -> Backend:
    """A byte-level BPE of about 500 tokens trained on CORPUS, with special and user-defined tokens."""
    from tokenizers import Regex

    from rvllm.text.tokenizers.pretokenizers import PRE_TOKENIZERS

    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in PRE_TOKENIZERS[pattern].splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t in DEFINED])
    return backend


def byte_level_metadata(pre: str = "qwen2", **extra: Any) -> dict[str, Any]:
    """The trained tokenizer as `tokenizer.ggml.*` metadata."""
    backend = trained(pre)
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = [3 if t in CONTROL else 4 if t in DEFINED else 1 for t in tokens]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.chat_template": TEMPLATE,
    } | extra


TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = (
    "he",
    "ll",
    "hell",
    "hello",
    "▁hello",
    "▁w",
    "or",
    "▁wor",
    "ld",
    "▁world",
    "▁▁",
    "▁▁▁▁",
    "the",
    "▁the",
)
LETTERS = "▁abcdefghijklmnopqrstuvwxyzé.,!"


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    """A SentencePiece BPE: control tokens, the 256 bytes, words (the longer, the better) and letters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *LETTERS]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(LETTERS))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(WORDS) + len(LETTERS))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | extra


def sentencepiece_file(prefix: bool) -> bytes:
    """The SentencePiece tokenizer in its own file format, by the rules of protocol buffers."""

    def varint(value: int) -> bytes:
        out = b""
        while value >= 0x80:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    def chunk(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    metadata = sentencepiece_metadata()
    out = b""
    for token, score, kind in zip(
        *(metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True
    ):
        out += chunk(
            1, chunk(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)
        )
    padding = varint(43 << 3) + varint((1 << 64) - 1)  # pad_id -1: none
    out += chunk(2, b"\x18\x02" + padding)  # model_type BPE
    return out + chunk(
        3, chunk(1, b"identity") + b"\x18" + varint(int(prefix)) + b"\x20\x00"
    )  # nothing is removed


PIECES = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "hello",
    "world",
    "un",
    "##believ",
    "##able",
    ",",
    "h",
    "##e",
)


def wordpiece_metadata() -> dict[str, Any]:
    """PIECES in the format's spelling: ▁ before the start of a word, no ## within one."""
    spelled = [p if p[0] == "[" else p[2:] if p.startswith("##") else "▁" + p for p in PIECES]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (len(PIECES) - 5),
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    }


def byte_level(pre: str = "qwen2", **extra: Any) -> Tokenizer:
    """The trained byte-level tokenizer, by way of GGUF metadata."""
    return Tokenizer(from_metadata(byte_level_metadata(pre, **extra), "tiny.gguf"))


def sentencepiece(**extra: Any) -> Tokenizer:
    """The SentencePiece tokenizer."""
    return Tokenizer(from_metadata(sentencepiece_metadata(**extra), "tiny.gguf"))


def wordpiece() -> Tokenizer:
    """The WordPiece tokenizer."""
    return Tokenizer(from_metadata(wordpiece_metadata(), "tiny.gguf"))


def write_directory(path: Path, config: dict[str, Any] | None = None) -> Path:
    """The trained tokenizer as a model directory holds it."""
    path.mkdir(exist_ok=True)
    trained().save(str(path / "tokenizer.json"))
    default = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(default if config is None else config))
    return path
