"""Philox, the counter-based generators of Salmon et al. 2011, and what draws tokens is made of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

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


def philox2x32(key: int, low: U64, high: int) -> tuple[U64, U64]:
    """Two 32-bit words for a 32-bit key and each counter low + 2^32 * high, by 7 rounds.

    Those are the fewest that pass BigCrush (Salmon et al. 2011, table 2).
    """
    left, right = low.copy(), np.full_like(low, high)
    product = np.empty_like(low)
    for _ in range(7):
        np.multiply(left, np.uint64(0xD256D193), out=product)
        np.right_shift(product, np.uint64(32), out=left)
        left ^= right
        left ^= np.uint64(key)
        np.bitwise_and(product, np.uint64(_MASK), out=right)
        key = (key + _WEYL[0]) & _MASK
    return left, right


def noise_words(seed: int, index: int, vocab: int) -> U64:
    """The 32-bit word of each token id whose noise draws output index `index` of a request with this seed.

    Ids that differ in bit 3 alone share a call of philox2x32: the words of ids i and i + 8 are its two.
    """
    _, key, high, _ = philox4x32(seed, index)
    both = philox2x32(key, np.arange(-(-vocab // 16) * 8, dtype=np.uint64), high)
    return np.stack([w.reshape(-1, 8) for w in both], axis=1).reshape(-1)[:vocab]


def gumbel(words: U64) -> NDArray[np.float64]:
    """Standard Gumbel numbers, -log(-log(u)), of u = 1 - (word + 1/2) / 2^32."""
    found: NDArray[np.float64] = -np.log(-np.log1p(-(words + 0.5) * 2.0**-32))
    return found
