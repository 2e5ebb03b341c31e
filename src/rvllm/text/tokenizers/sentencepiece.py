"""Reads `tokenizer.model`, SentencePiece's own file: a protocol-buffer message (sentencepiece_model.proto).

Only the fields that define the vocabulary are taken, and handed on as GGUF metadata, which holds the same
facts under llama.cpp's names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rvllm.errors import ModelError

UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
_KINDS = {UNIGRAM: "t5", BPE: "llama"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Field = tuple[int, int | bytes]  # (number, value)


def read_model(path: Path) -> dict[str, Any]:
    """The file as `tokenizer.ggml.*` metadata. Raises ModelError naming the file and what is wrong."""
    try:
        return _metadata(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from None


def _metadata(data: bytes) -> dict[str, Any]:
    """ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_message(value)))  # 1 piece, 2 score, 3 type
            tokens.append(_message(piece.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _message(piece.get(2, bytes(4))))[0])
            types.append(_number(piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    kind = _number(trainer.get(3, UNIGRAM))
    if not tokens:
        raise ValueError("it has no pieces")
    if kind not in _KINDS:
        raise ValueError(f"its trainer_spec.model_type is {kind}; supported: 1 (unigram) and 2 (BPE)")
    ids = {
        "unknown_token_id": (40, 0),
        "bos_token_id": (41, 1),
        "eos_token_id": (42, 2),
        "padding_token_id": (43, -1),
    }
    found = {name: _signed(trainer.get(number, default)) for name, (number, default) in ids.items()}
    return {
        "tokenizer.ggml.model": _KINDS[kind],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,  # the same numbers in both formats
        "tokenizer.ggml.precompiled_charsmap": _message(normalizer.get(2, b"")),
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        **{f"tokenizer.ggml.{name}": index for name, index in found.items() if index >= 0},
    }


def _fields(data: bytes) -> Iterator[Field]:
    """The fields of a message: whole numbers for varints, bytes for all else. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"cut short at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut short within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 64 bits at byte {at}")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _signed(value: int | bytes) -> int:
    """An int32 as protocol buffers write it: negative ones as 64-bit two's complement."""
    number = _number(value)
    return number - (1 << 64) if number >= 1 << 63 else number
