"""Mistral's tekken.json: tokens with their ranks, the expression that cuts texts, and special tokens.

Special tokens have the first ids, tokens of text those behind them, as mistral-common gives them out.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rvllm.errors import ModelError
from rvllm.text.chat.mistral import TEMPLATES
from rvllm.text.tokenizers.parts import DEFAULT_TEMPLATE, TokenizerParts, frame
from rvllm.text.tokenizers.tiktoken import MAX_BYTES, TiktokenClass, check_ranks, from_ranks
from rvllm.weights.mapped import read_file

NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Of files that name no special tokens: those of the first models, in the order of their ids.
_FIRST = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


class _Config(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str = ""


class _Token(msgspec.Struct):
    rank: int
    token_bytes: str


class _Special(msgspec.Struct):
    rank: int
    token_str: str


class _File(msgspec.Struct):
    config: _Config
    vocab: list[_Token]
    special_tokens: list[_Special] | None = None


def from_tekken(file: Path) -> TokenizerParts:
    """The tokenizer, with a chat template for the versions that one can write. Raises ModelError."""
    try:
        data = msgspec.json.decode(read_file(file, MAX_BYTES, "vocabulary"), type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}") from None
    count = data.config.default_num_special_tokens
    ranks = _ranks(file, data.vocab, data.config.default_vocab_size - count)
    special = _special(file, data.special_tokens, count)
    backend = from_ranks(ranks, TiktokenClass(data.config.pattern, special), str(file), count)
    named = {name: token for name, token in NAMES.items() if token in special.values()}
    frame(backend, named.get("bos_token"), None)
    template = TEMPLATES.get(data.config.version.partition("m")[0])
    return TokenizerParts(backend, str(file), named, {} if template is None else {DEFAULT_TEMPLATE: template})


def _ranks(file: Path, vocab: Sequence[_Token], count: int) -> dict[bytes, int]:
    """The first `count` tokens; a file may hold more than its model has."""
    found: dict[bytes, int] = {}
    for token in vocab:
        if token.rank < count:
            try:
                found[base64.b64decode(token.token_bytes, validate=True)] = token.rank
            except (binascii.Error, ValueError):
                raise ModelError(f"{file}: the token of rank {token.rank} is not in base64") from None
    check_ranks(found, file)
    return found


def _special(file: Path, named: Sequence[_Special] | None, count: int) -> dict[int, str]:
    """Special tokens by id; places without a name have one of their number."""
    given = {token.rank: token.token_str for token in named} if named else dict(enumerate(_FIRST))
    wrong = [rank for rank in given if not 0 <= rank < count]
    if wrong:
        raise ModelError(f"{file}: special token {wrong[0]} is none of the first {count}")
    special = {rank: given.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)}
    if len(set(special.values())) != count:
        raise ModelError(f"{file}: two special tokens have the same name")
    return special
