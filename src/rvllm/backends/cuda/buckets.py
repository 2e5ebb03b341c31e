"""Padded step sizes, so that a graph captured once serves every smaller step of its bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from math import log2

MIXED_TOKENS = 2048  # of a step with decodes, for which they all wait; up to twice as many where that pays
WAIT_PRICE = 0.02  # share of the tokens a second for which decodes may wait twice as long


def decode_buckets(most: int) -> list[int]:
    """Padded batch sizes of decode steps: 1, 2, 4, 8, 16, 24, 32 ... 256, by 16 to 512, then by 32.

    `most` is the last. The padding is at most a sixteenth from 128 on.
    """
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, max(most, 544) + 32, 32)]
    return [size for size in sizes if size < most] + [most]


def token_buckets(most: int) -> list[int]:
    """Padded token counts of steps with prompts; the padding is at most an eighth from 113 tokens on.

    Between 2,048 and 8,192 it is less than 128 tokens: such a step takes 40 ms and more for a 7B model, of
    which padding to the next eighth cost up to 5, and capturing its graph takes 10 once.
    """
    sizes = [16, 32, 48, 64]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last + (128 if 2048 <= last < 8192 else max(16, 1 << (last.bit_length() - 4))))
    return [size for size in sizes if size < most] + [most]


def mixed_tokens(sizes: Iterable[int], seconds: Callable[[int], float]) -> int:
    """The most tokens of a step with decodes: of the padded sizes from MIXED_TOKENS to twice that the best.

    seconds: what a step of a size takes, in any unit. Products take whole rounds of tiles, so that one size
    costs a token up to a tenth less than its neighbours; the longer step must be worth the wait.
    """

    def price(size: int) -> float:
        return seconds(size) / size * (1 + WAIT_PRICE * log2(size / MIXED_TOKENS))

    return min((s for s in sizes if MIXED_TOKENS <= s <= 2 * MIXED_TOKENS), key=price, default=MIXED_TOKENS)


def bucket_of(buckets: list[int], size: int) -> int:
    """The smallest bucket that holds `size`, which must not exceed the last."""
    return buckets[bisect_left(buckets, size)]
