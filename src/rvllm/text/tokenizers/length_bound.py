"""The fewest tokens a text can have, from its size alone: hopeless prompts are refused before they cost.

A byte-pair token stands for at most as many bytes as its spelling has, so a text of b bytes has at least
b / (longest token) tokens, as long as nothing on the way drops or shortens text. Where that is not certain
(word pieces with [UNK], tokens that swallow the space beside them, normalisers that fold), there is no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rvllm.text.tokenizers.spelling import CHARACTER_BYTES, Spelling, state_of

if TYPE_CHECKING:
    import tokenizers

# The most UTF-8 bytes that composition makes one of: three Hangul letters of 3 bytes become a syllable of 3.
_COMPOSED = 3
_KEEPS_TEXT = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation"}


@dataclass(frozen=True)
class LengthBound:
    """longest: most bytes of text that one token can stand for; dropped: bytes that may become no token."""

    longest: int
    dropped: bytes

    def fewest_tokens(self, text: str) -> int:
        """No tokenisation of `text` is shorter."""
        kept = text.encode("utf-8", "replace").translate(None, self.dropped)
        return -(-len(kept) // self.longest)


def length_bound(backend: tokenizers.Tokenizer, spelling: Spelling) -> LengthBound | None:
    """The bound for a tokenizer; None where there is none. Reads the whole vocabulary once."""
    from tokenizers.models import BPE

    model = backend.model
    growth = _shrinks(state_of(backend.normalizer))
    if not isinstance(model, BPE) or growth is None or not _keeps_text(state_of(backend.pre_tokenizer)):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    words = backend.get_vocab(with_added_tokens=False)
    if spelling.kind == "bytes":
        longest = max(map(len, words), default=0)
        dropped = bytes(byte for character, byte in CHARACTER_BYTES.items() if character not in words)
    elif spelling.kind == "pieces" and model.byte_fallback:
        longest = max((len(word.encode()) for word in words), default=0)
        dropped = bytes(byte for byte in range(256) if f"<0x{byte:02X}>" not in words)
    else:
        return None
    longest = max([longest, *(len(token.content.encode()) for token in added)])
    return LengthBound(max(longest, 1) * growth, dropped)


def _shrinks(state: dict[str, Any]) -> int | None:
    """How many times shorter a normaliser can make a text, at most; None when that is not known."""
    kind = state.get("type")
    if kind is None or kind == "Prepend":
        return 1
    if kind == "NFC":
        return _COMPOSED
    if kind == "Replace":
        given = state["pattern"].get("String")
        return 1 if given and len(state["content"].encode()) >= len(given.encode()) else None
    if kind == "Sequence":
        growth = 1
        for step in state["normalizers"]:
            factor = _shrinks(step)
            if factor is None:
                return None
            growth *= factor
        return growth
    return None


def _keeps_text(state: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts the text, and drops none of it."""
    kind = state.get("type")
    if kind == "Sequence":
        return all(_keeps_text(step) for step in state["pretokenizers"])
    return kind is None or (kind in _KEEPS_TEXT and state.get("behavior") != "Removed")
