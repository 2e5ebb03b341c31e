"""tiktoken's vocabulary files: a token in base64 and its rank on each line, and nothing else.

tiktoken merges, in each piece of a text, the neighbours whose union has the lowest rank, and takes a piece
that is itself a token whole. How text is cut into pieces and which special tokens there are stands in the
code of the tokenizer class, so classes are named here one by one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rvllm.errors import ModelError
from rvllm.text.tokenizers.parts import built, byte_level
from rvllm.text.tokenizers.pretokenizers import PRE_TOKENIZERS
from rvllm.text.tokenizers.spelling import byte_characters
from rvllm.weights.mapped import read_file

if TYPE_CHECKING:
    import tokenizers

MAX_BYTES = 64 << 20  # of a vocabulary file


@dataclass(frozen=True)
class TiktokenClass:
    """What a tokenizer class adds to its file: the expression that cuts text, and special tokens by id."""

    pattern: str
    special: Mapping[int, str]


def _phi3small() -> TiktokenClass:
    """cl100k_base with tokens for chats; its other places up to a vocabulary of 100352 hold dummies."""
    named = {
        100257: "<|endoftext|>", 100258: "<|fim_prefix|>", 100259: "<|fim_middle|>", 100260: "<|fim_suffix|>",
        100261: "<|system|>", 100262: "<|user|>", 100263: "<|assistant|>", 100266: "<|end|>",
        100276: "<|endofprompt|>",
    }  # fmt: skip
    dummies = [100264, 100265, 100256, *range(100267, 100276), *range(100277, 100352)]
    numbered = {token: f"<|dummy_id_{number}|>" for number, token in enumerate(dummies)}
    (cl100k,) = PRE_TOKENIZERS["dbrx"].splits
    return TiktokenClass(cl100k, named | numbered)


CLASSES = {"Phi3SmallTokenizer": _phi3small}


def from_tiktoken(file: Path, tokenizer_class: object) -> tokenizers.Tokenizer:
    """The tokenizer of a .tiktoken file, as the class named in tokenizer_config.json uses it.

    Raises ModelError naming the file and the line or class that is wrong or not supported.
    """
    if not isinstance(tokenizer_class, str) or tokenizer_class not in CLASSES:
        raise ModelError(
            f"{file}: tokenizer_class {tokenizer_class!r} does not say how texts are cut; supported with "
            f"tiktoken's files: {', '.join(sorted(CLASSES))}"
        )
    return from_ranks(read_ranks(file), CLASSES[tokenizer_class](), str(file))


def from_ranks(
    ranks: Mapping[bytes, int], rules: TiktokenClass, origin: str, first: int = 0
) -> tokenizers.Tokenizer:
    """The tokenizer of tokens and their ranks. first: the id of rank 0; origin: what errors call it."""
    from tokenizers import AddedToken, models

    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join([characters[byte] for byte in token])

    vocab = {spelled(token): first + rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(ranks)]
    taken = set(vocab.values()) & rules.special.keys()
    if taken:
        raise ModelError(f"{origin}: rank {min(taken) - first} is that of a special token")
    vocab |= {token: index for index, token in rules.special.items()}
    model = built(lambda: models.BPE(vocab=vocab, merges=merges, ignore_merges=True), origin)
    backend = built(lambda: byte_level(model, [rules.pattern]), origin)
    ordered = [rules.special[index] for index in sorted(rules.special)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordered])
    return backend


def read_ranks(file: Path) -> dict[bytes, int]:
    """Tokens and their ranks. Raises ModelError naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(file, MAX_BYTES, "vocabulary").splitlines(), start=1):
        if not line.strip():
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise ModelError(f"{file}: line {number} is not a token in base64 and its rank") from None
    check_ranks(ranks, file)
    return ranks


def check_ranks(ranks: Mapping[bytes, int], file: Path) -> None:
    """Raises ModelError where a byte has no token, or two tokens have one rank."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ModelError(f"{file}: holds no token for byte {missing[0]}")
    if len(set(ranks.values())) != len(ranks):
        raise ModelError(f"{file}: two tokens have the same rank")


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token the two that it is merged from, in order of rank.

    They are what is left of its bytes after all merges of lower rank. A merge across its border would have
    kept it from being made, so it is made from the same two in any text.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) == 1:
            continue
        halves = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank
        ]
        if len(halves) > 1:  # rare enough that the slow way does not show
            parts = merged(token, ranks, rank)
            halves = [(parts[0], parts[1])] if len(parts) == 2 else []
        found += halves[:1]
    return found


def merged(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """A token's bytes after all merges of a rank lower than `below`, lowest first, of equals the left one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, at = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < best:
                best, at = rank, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
