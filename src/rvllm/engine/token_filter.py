"""Tokens that a request lets through: `allowed_token_ids` and `bad_words`, as masks for the backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rvllm.engine.matcher import Mask


class TokenFilter:
    """The masks of one request.

    allowed: the only tokens it may draw; empty: any. bad: token sequences that it must not write; the last
    token of one is held back where the output ends in the others.
    """

    __slots__ = ("_bad", "_mask")

    def __init__(self, vocab_size: int, allowed: Sequence[int], bad: Sequence[Sequence[int]]) -> None:
        bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
        if allowed:
            bits[list(allowed)] = True
        else:
            bits[:vocab_size] = True
        bits[[word[0] for word in bad if len(word) == 1]] = False
        self._mask: Mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
        self._bad: dict[int, list[tuple[list[int], int]]] = {}  # by the last token but one: (before, last)
        for *before, last in bad:
            if before:
                self._bad.setdefault(before[-1], []).append((before, last))

    @property
    def follows(self) -> bool:
        """Whether the next mask depends on the tokens before it."""
        return bool(self._bad)

    def mask(self, output: Sequence[int]) -> Mask:
        """The tokens that may follow the output so far; not to be changed."""
        found = self._mask
        for before, last in self._bad.get(output[-1], ()) if output else ():
            if len(output) >= len(before) and list(output[-len(before) :]) == before:
                found = found.copy() if found is self._mask else found
                found[last >> 5] &= np.uint32(~(1 << (last & 31)) & 0xFFFFFFFF)
        return found
