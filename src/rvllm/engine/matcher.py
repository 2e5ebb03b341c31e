"""One sequence's place in its grammar, and what following it may cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

ALLOWANCE = 2.0  # seconds that following a grammar may cost, and seconds more for each token
ALLOWANCE_PER_TOKEN = 0.01
COSTLY = 0.001  # seconds: a matcher whose last token took longer is followed beside the engine's thread

Mask = NDArray[np.uint32]  # [ceil(vocab / 32)], lowest bit first: the tokens that may come next


class Matcher:
    """One sequence's place in its grammar.

    native: llguidance's own object. mask: of the next token; None until it has been made. seconds: what
    following the grammar has cost so far. An ambiguous one can cost ever more with each token; one that
    exceeds its allowance ends its request. costly: whether the last token took so long that the engine's
    thread should not wait for the next.
    """

    __slots__ = ("_since", "_tokens", "costly", "mask", "native", "seconds")

    def __init__(self, matcher: LLMatcher) -> None:
        self.native = matcher
        self._tokens = 0
        self._since = 0.0  # seconds before the current token
        self.seconds = 0.0
        self.costly = False
        self.mask: Mask | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: the text is complete."""
        return bool(self.native.is_stopped()) and not self.native.is_error()

    @property
    def error(self) -> str | None:
        """What is wrong, on one line; None while nothing is."""
        if not self.native.is_error():
            return None
        return str(self.native.get_error()).strip().partition("\n")[0]

    @property
    def too_complex(self) -> str | None:
        """The error of a matcher that has exceeded its limits; None while it has not."""
        if self.error == "NoExtensionBias":  # llguidance's word where no token can come next
            return "the grammar allows no text at all"
        return None if self.error is None else f"the grammar is too complex to follow: {self.error}"

    def accept(self, token: int) -> str | None:
        """Moves on by a drawn token; returns what is wrong when the grammar does not allow it."""
        began = time.perf_counter()
        self.mask = None
        self._since = self.seconds
        accepted = self.native.consume_token(token)
        self._tokens += 1
        self.seconds += time.perf_counter() - began
        if self.seconds > ALLOWANCE + ALLOWANCE_PER_TOKEN * self._tokens:
            return f"the grammar is too costly to follow: {self.seconds:.1f} s for {self._tokens} tokens"
        if accepted:
            return None
        reason = self.error or ""
        if "satisfy the grammar" not in reason:
            return self.too_complex
        others = "bad_words, allowed_token_ids, min_tokens, stop_token_ids or logit_bias"
        return f"no token fits both the grammar and {others}: {reason}"

    def next_mask(self, words: int) -> tuple[Mask, float]:
        """(the next mask [words], the seconds it took), made in whatever thread."""
        row, began = np.zeros(words, dtype=np.uint32), time.perf_counter()
        self.native.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return row, time.perf_counter() - began

    def filled(self, row: Mask, seconds: float) -> None:
        """Takes the mask that has been made in `row`, which took so long: from now on it is used."""
        self.seconds += seconds
        self.costly = self.seconds - self._since > COSTLY
        self.mask = row
