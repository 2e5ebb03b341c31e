"""How the strings of a vocabulary stand for bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary's strings stand for bytes, after the tokenizer's decoder.

    kind: "bytes" for byte-level BPE (each character is a byte), "pieces" for SentencePiece (▁ is a space,
    <0xNN> a byte), "other" for all else.
    strip_left: a leading space of the whole text is dropped.
    """

    kind: str
    strip_left: bool = False

    def bytes_of(self, token: str) -> bytes:
        """The bytes of one token in the vocabulary's spelling."""
        if self.kind == "bytes":
            try:
                return bytes([CHARACTER_BYTES[c] for c in token])
            except KeyError:  # an added token holding a character outside of the alphabet stands for itself
                return token.encode()
        if self.kind == "pieces":
            byte = byte_piece(token)
            return token.replace("▁", " ").encode() if byte is None else bytes([byte])
        return token.encode()


def byte_piece(token: str) -> int | None:
    """The byte that a SentencePiece token such as `<0x0A>` stands for; None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def state_of(part: Any) -> dict[str, Any]:
    """A normaliser's, pre-tokenizer's or decoder's settings; empty when there is none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def spelling_of(backend: tokenizers.Tokenizer) -> Spelling:
    """Reads from the tokenizer's decoder how its vocabulary is spelled."""
    state = state_of(backend.decoder)
    if not state:
        return Spelling("other")
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling("bytes")
    replaces = [s for s in steps if s["type"] == "Replace"]
    pieces = all(s["pattern"] == {"String": "▁"} and s["content"] == " " for s in replaces)
    if replaces and pieces and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        strips = [s for s in steps if s["type"] == "Strip"]
        simple = all(s["content"] == " " and s["start"] <= 1 and s["stop"] == 0 for s in strips)
        if simple and "ByteFallback" in kinds and "Fuse" in kinds:
            return Spelling("pieces", strip_left=any(s["start"] == 1 for s in strips))
    return Spelling("other")


def byte_characters() -> dict[int, str]:
    """Byte-level BPE's alphabet: a printable character for each byte (GPT-2, Radford et al. 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


CHARACTER_BYTES = {character: byte for byte, character in byte_characters().items()}
