"""Philox4x32-10, the counter-based generator of Salmon et al. 2011."""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(key: int, counter: int) -> tuple[int, int, int, int]:
    """Four 32-bit words for a 64-bit key and a 128-bit counter; low words first in both."""
    c0, c1, c2, c3 = ((counter >> shift) & _MASK for shift in (0, 32, 64, 96))
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & _MASK, (left >> 32) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that draws the token at output index `index` of a request with this seed."""
    return philox4x32(seed, index)[0] / 2.0**32
