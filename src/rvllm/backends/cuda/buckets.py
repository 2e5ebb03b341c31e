"""Padded step sizes, so that a graph captured once serves every smaller step of its bucket."""

from __future__ import annotations

from bisect import bisect_left

MIXED_TOKENS = 2048  # of a step with decodes: more of them are hardly cheaper, and decodes wait for all


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


def bucket_of(buckets: list[int], size: int) -> int:
    """The smallest bucket that holds `size`, which must not exceed the last."""
    return buckets[bisect_left(buckets, size)]
